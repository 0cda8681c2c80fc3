"""The registry of losses: its entries can be built, and their parameters are the settings of `loss`."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon import losses
from hpc_supcon.config import load_config
from hpc_supcon.errors import ConfigError
from hpc_supcon.training.objective import GRADIENT_RESPONSE_LOSSES, Objective

# Settings of the loss section that say which losses there are and what they are given, not how one is computed.
NOT_OF_A_LOSS = {"options", "name", "terms", "supervised", "frozen_epochs", "queue_start_epoch", "keys"}
# Parameters for those who use the losses without a configuration.
NOT_SETTINGS = {"gather", "validate"}
# What the queue of moco_v2 and the prototypes of swav and dino are built from.
FROM_OTHER_SECTIONS = {
    *("projection_dim", "views", "global_views", "seed", "frozen_steps", "queue_start_steps", "steps_per_epoch")
}


def test_every_loss_can_be_built_by_its_name():
    assert sorted(losses.LOSSES) == [
        "barlow_twins",
        "byol",
        "cross_entropy",
        "cross_entropy_mae",
        "dino",
        "moco_v2",
        "reconstruction",
        "simclr",
        "simsiam",
        "supcon_in",
        "supcon_out",
        "swav",
        "tcl",
        "triplet",
        "vicreg",
    ]
    assert losses.LOSSES["supcon_in"].factory(temperature=0.2).form == "in"
    assert losses.LOSSES["supcon_out"].factory().form == "out"
    for spec in losses.LOSSES.values():
        assert isinstance(spec.factory(), torch.nn.Module)


def test_parameters_are_those_of_the_factory_without_the_preset_ones():
    assert losses.LOSSES["triplet"].parameters == ("margin", "mining", "squared", "gather", "validate")
    assert losses.LOSSES["cross_entropy"].parameters == ()
    assert "form" not in losses.LOSSES["supcon_out"].parameters
    assert {"temperature", "learnable_temperature", "k1", "k2"} <= set(losses.LOSSES["tcl"].parameters)


def test_settings_of_the_loss_section_and_parameters_of_the_losses_have_the_same_names():
    settings = set(load_config().loss.model_dump()) - NOT_OF_A_LOSS
    parameters = {name for spec in losses.LOSSES.values() for name in spec.parameters}
    assert parameters - NOT_SETTINGS - FROM_OTHER_SECTIONS == settings


def test_what_a_loss_reads_and_needs_follows_from_its_kind():
    for name, spec in losses.LOSSES.items():
        assert spec.pairwise == (spec.head in ("projection", "prediction", "features")), name
        assert (spec.contrastive or spec.of_views) == (spec.head in ("projection", "prediction")), name
        assert not (spec.contrastive and spec.of_views), name
        assert not (spec.of_views and spec.uses_labels), name
        assert spec.pairwise or not spec.needs_pairs, name
    assert all(losses.LOSSES[name].contrastive for name in GRADIENT_RESPONSE_LOSSES)


def test_an_objective_gives_each_loss_its_own_settings():
    settings = load_config("default", ["loss.temperature=0.3", "loss.k1=7", "loss.margin=2.5"]).loss.model_dump()
    objective = Objective({"tcl": 1.0, "triplet": 1.0, "cross_entropy": 1.0}, settings)
    assert (objective.losses["tcl"].temperature, objective.losses["tcl"].k1) == (0.3, 7)
    assert objective.losses["triplet"].margin == 2.5
    assert not objective.losses["tcl"].validate
    assert not objective.losses["triplet"].validate


def test_an_unknown_loss_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"loss\.name: unknown loss 'supcon_uot'; did you mean 'supcon_out'"):
        losses.loss_spec("supcon_uot")
