"""Which checkpoint of a run folder is its best one."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon import checkpoint, run_folder
from hpc_supcon.config import load_config
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.models import build_model
from hpc_supcon.stages.probe import probe
from hpc_supcon.training.build import describe_model
from hpc_supcon.training.data import load_data

SETTINGS = [
    "data.source=synthetic", "data.synthetic={images: 60, classes: 3, channels: 1, image_size: 8}",
    "model.encoder=conv", "model.out_dim=4", "probe.kind=knn", "probe.knn.k=3", "log.tensorboard=false",
    "log.progress=false",
]  # fmt: skip
RUNTIME = Runtime(Launch(), torch.device("cpu"))


@pytest.fixture
def run(tmp_path):
    """(folder, config, data) of a run stopped early: checkpoints of steps 2 and 4, of which step 2 was the best."""
    config = load_config("default", [*SETTINGS, f"run_dir={tmp_path / 'run'}"])
    data = load_data(config, RUNTIME)
    description = describe_model(config, data.splits)
    run_folder.create(config.folder, config)
    for step in (2, 4):
        torch.manual_seed(step)
        checkpoint.save_checkpoint(
            config.folder / "checkpoints",
            step,
            {"model": build_model(description).state_dict()},
            {**description, "stopping": {"best_at": 2}},
            world_size=1,
            config_digest="",
        )
    return config.folder, config, data


def test_the_best_checkpoint_is_loaded_also_while_a_killed_save_left_it_renamed_aside(run, capsys):
    folder, config, data = run
    best, _ = load_model(folder)
    (folder / "checkpoints/step-2").rename(folder / "checkpoints/.replaced-step-2")
    model, found = load_model(folder)
    assert found.state["step"] == 2
    assert not capsys.readouterr().err
    for name, tensor in best.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    (result,) = probe(folder, config, RUNTIME, data)
    assert result["checkpoint"] == "step-2"


def test_a_missing_best_checkpoint_is_reported_and_the_newest_one_is_taken(run, capsys):
    folder, _, _ = run
    (folder / "checkpoints/step-2").rename(folder / "elsewhere")
    assert load_model(folder)[1].name == "step-4"
    assert "taking step-4 in place of the best, step 2" in capsys.readouterr().err
