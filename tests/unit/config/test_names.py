"""The closed sets of names in the schema are the keys of the registries that they stand for."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from typing import Any, get_args

import pytest
import timm
from torch import nn

from hpc_supcon.config import encoders, schema_rows
from hpc_supcon.config.check import MAX_TRITON_DIM, MIN_TEMPERATURE, MIN_TRITON_TEMPERATURE, Stage
from hpc_supcon.config.schema import ProbeConfig, names
from hpc_supcon.data.corruptions import BENCHMARK, CORRUPTIONS
from hpc_supcon.data.loaders import LOADERS
from hpc_supcon.data.samplers import SAMPLERS
from hpc_supcon.data.sources.by_name import OWN_SOURCES, SOURCES
from hpc_supcon.data.sources.splits import open_source
from hpc_supcon.data.views.policies import AUTOAUGMENT_NAMES
from hpc_supcon.data.views.views import POLICIES
from hpc_supcon.errors import ConfigError
from hpc_supcon.evaluation import monitor
from hpc_supcon.evaluation.maps import METHODS
from hpc_supcon.evaluation.probes import PROBES
from hpc_supcon.evaluation.probes.optimization import OPTIMIZERS as PROBE_OPTIMIZERS
from hpc_supcon.grid.schema import STAGES
from hpc_supcon.losses import LOSSES
from hpc_supcon.losses.pairwise import BACKENDS
from hpc_supcon.losses.precision import PRECISIONS
from hpc_supcon.losses.temperature import FP32_TEMPERATURE
from hpc_supcon.losses.temperature import MIN_TEMPERATURE as LEAST_OF_THE_LOSSES
from hpc_supcon.losses.triplet import MINING
from hpc_supcon.models.encoders import ENCODERS, build_encoder
from hpc_supcon.models.heads import ACTIVATIONS, NORMS, build_decoder
from hpc_supcon.models.timm_encoders import STEMS
from hpc_supcon.pruning import CHANNEL_SCORES, PRUNERS, SCOPES, VALUES
from hpc_supcon.tracking import TRACKERS
from hpc_supcon.training.engine import ENGINES
from hpc_supcon.training.loggers import LOGGERS
from hpc_supcon.training.objective import GRADIENT_RESPONSE_LOSSES
from hpc_supcon.training.optim import OPTIMIZERS
from hpc_supcon.training.optim.schedule import SCHEDULES


def losses_by(fact) -> set[str]:
    """The losses of the registry whose entry fulfills `fact`."""
    return {name for name, spec in LOSSES.items() if fact(spec)}


@pytest.mark.parametrize(
    ("literal", "registry"),
    [
        (names.SourceName, SOURCES),
        (names.OwnSourceName, OWN_SOURCES),
        (names.SamplerName, SAMPLERS),
        (names.LoaderName, ["auto", *LOADERS]),
        (names.PolicyName, POLICIES),
        (names.AutoAugmentName, AUTOAUGMENT_NAMES),
        (names.OwnEncoderName, ENCODERS),
        (names.ProjectionNormName, NORMS),
        (names.ActivationName, ACTIVATIONS),
        (names.StemName, STEMS),
        (names.LossName, LOSSES),
        (names.MiningName, MINING),
        (names.BackendName, BACKENDS),
        (names.LossPrecisionName, PRECISIONS),
        (names.OptimizerName, OPTIMIZERS),
        (names.ScheduleName, SCHEDULES),
        (names.EngineName, ENGINES),
        (names.OnlineProbeName, ["none", *monitor.KINDS]),
        (names.ProbeName, PROBES),
        (names.ProbeOptimizerName, PROBE_OPTIMIZERS),
        (names.CorruptionName, CORRUPTIONS),
        (names.BenchmarkCorruptionName, BENCHMARK),
        (names.MapMethodName, METHODS),
        (names.PruningMethodName, [*PRUNERS, "channels"]),
        (names.ChannelScoreName, CHANNEL_SCORES),
        (names.SparseValuesName, VALUES),
        (names.WeightPruningName, [name for name, spec in PRUNERS.items() if spec.needs == "weights"]),
        (names.PruningScopeName, SCOPES),
        (names.LoggerName, LOGGERS),
        (names.TrackerName, TRACKERS),
        (Stage, STAGES),
        # what the rules between settings know of the losses
        (names.ContrastiveName, losses_by(lambda spec: spec.contrastive)),
        (names.MultiCropName, losses_by(lambda spec: spec.multi_crop)),
        (names.OfViewsName, losses_by(lambda spec: spec.of_views)),
        (names.PredictorName, losses_by(lambda spec: spec.head == "prediction")),
        (names.TargetName, losses_by(lambda spec: spec.other == "target")),
        (names.PairwiseName, losses_by(lambda spec: spec.pairwise)),
        (names.ClassifierLossName, losses_by(lambda spec: spec.head == "classifier")),
        (names.DecoderLossName, losses_by(lambda spec: spec.head == "decoder")),
        (names.ResponseLossName, GRADIENT_RESPONSE_LOSSES),
    ],
)
def test_the_names_are_the_keys_of_the_registry(literal: Any, registry: Iterable[str]):
    assert set(get_args(literal)) == set(registry)


def test_every_probe_has_a_section_of_its_name():
    others = {"kind", "options", "corruptions", "corruption_images", "embedding", "ood", "transfer"}
    assert set(ProbeConfig.model_fields) == {*others, *get_args(names.ProbeName)}


def test_the_limits_of_the_contrastive_losses_are_those_of_the_losses():
    assert (MIN_TEMPERATURE, MIN_TRITON_TEMPERATURE) == (LEAST_OF_THE_LOSSES, FP32_TEMPERATURE)
    assert MAX_TRITON_DIM == 2048


@pytest.mark.parametrize("name", get_args(names.OwnEncoderName))
def test_our_own_encoders_have_one_stem_and_conv_alone_a_decoder(name):
    with pytest.raises(ConfigError, match="has only its own stem"):
        build_encoder(name, stem="small")
    if name == "conv":
        assert isinstance(build_decoder(name, 8, 3, 32), nn.Module)
    else:
        with pytest.raises(ConfigError, match="has no decoder"):
            build_decoder(name, 8, 3, 32)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_data_sets_other_than_image_folders_have_no_validation_split(name):
    assert open_source(name).validation is None


def test_the_names_read_from_timms_source_are_those_that_timm_lists():
    assert encoders.timm_models() == set(timm.list_models())


def test_encoders_are_checked_without_importing_timm_or_torch(python):
    code = (
        "import sys; from hpc_supcon.config.encoders import check_encoder\n"
        "check_encoder('resnet18')\n"
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([python, "-c", code], check=True)


@pytest.mark.parametrize("name", ["resnet19", "resnet18.a1_in1k", "Resnet18", "conv2", ""])
def test_an_encoder_that_does_not_exist_is_refused_as_when_it_is_built(name):
    with pytest.raises(ConfigError, match=r"^unknown model\.encoder") as early:
        encoders.check_encoder(name)
    with pytest.raises(ConfigError) as late:
        build_encoder(name)
    assert str(early.value).partition(repr(name))[2] == str(late.value).partition(repr(name))[2]


def test_without_timm_the_names_are_left_to_the_models(monkeypatch):
    encoders.timm_models.cache_clear()
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    encoders.check_encoder("resnet19")
    encoders.timm_models.cache_clear()


def test_the_schema_lists_the_names_and_no_description_repeats_them():
    rows = {key: (kind, meaning) for key, kind, _, _, meaning in schema_rows()}
    for key, literal in [
        ("data.source", names.SourceName), ("loss.name", names.LossName), ("optim.name", names.OptimizerName),
        ("augment.policy", names.PolicyName), ("prune.method", names.PruningMethodName),
    ]:  # fmt: skip
        own = ["package.module:name"] * (key not in ("optim.name", "prune.method"))
        assert rows[key][0] == " | ".join([*get_args(literal), *own])
    losses = " | ".join([*get_args(names.LossName), "package.module:name"])
    assert rows["loss.terms"][0] == f"{{{losses}: float}} | null"
    assert "[linear | softmax" in rows["probe.kind"][0]
    assert not [key for key, (kind, meaning) in rows.items() if kind in meaning and " | " in kind]
    assert "vgg16_bn_embed" in rows["model.encoder"][1]
