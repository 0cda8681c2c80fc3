"""Pruning on two ranks: equal masks on both, and fine-tuning that was killed resumes bit for bit."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from hpc_supcon import checkpoint
from hpc_supcon.config import load_config
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.run_folder import read_config
from hpc_supcon.stages import pretrain
from hpc_supcon.stages.prune import prune
from hpc_supcon.training.checkpointer import Checkpointer
from hpc_supcon.training.data import load_data
from tests.dist.ranks import run_ranks
from tests.unit.pruning.test_pruning import assert_pruned, torch_masks

SETTINGS = [
    "data.source=synthetic", "data.synthetic={images: 90, classes: 3, channels: 3, image_size: 16}",
    "data.batch_size=16", "model.encoder=conv", "model.projection_hidden=32", "model.projection_dim=16",
    "train.iterations=4", "checkpoint.every_epochs=null", "checkpoint.every_steps=7", "checkpoint.asynchronous=false",
    "log.progress=false", "log.tensorboard=false", "train.precision=fp32", "train.ema=0.9", "optim.weight_decay=0.01",
    "probe.kind=[knn, finetune]", "probe.knn.k=5", "probe.finetune.epochs=1", "probe.finetune.batch_size=16",
]  # fmt: skip
STEPS = 24


def stage(rank, world_size, folder, label=None, resume=False, kill_at=None):
    """The dense run without a label, else a pruning; every rank kills itself after saving step `kill_at`."""
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    torch.use_deterministic_algorithms(True)
    if label is None:
        config = load_config("default", [*SETTINGS, f"run_dir={folder}"])
        pretrain.pretrain(config, runtime, load_data(config, runtime))
        return None
    tune = ["prune.rate=[0.7, 0.3]", f"prune.finetune.iterations={STEPS}", f"prune.label={label}"]
    config = read_config(folder, tune)
    save = Checkpointer.save

    def save_and_die(checkpointer, state):
        save(checkpointer, state)
        if state.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpointer.save = save_and_die
    return prune(folder, config, runtime, load_data(config, runtime), resume=resume)


def test_two_ranks_prune_the_same_weights_and_killed_fine_tuning_resumes_bit_for_bit(tmp_path):
    dense = tmp_path / "dense"
    run_ranks(stage, 2, dense)
    first, second = run_ranks(stage, 2, dense, "whole")
    assert first[0]["test"] == second[0]["test"]
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(stage, 2, dense, "killed", False, 14)
    assert checkpoint.list_steps(dense / "pruned/l1-global-0.7-killed/checkpoints")[-1] == 14
    run_ranks(stage, 2, dense, "killed", True)
    for rate in (0.7, 0.3):
        whole, killed = (
            checkpoint.load_checkpoint(dense / f"pruned/l1-global-{rate}-{label}/checkpoints/step-{STEPS}")
            for label in ("whole", "killed")
        )
        assert whole.tensors.keys() == killed.tensors.keys() >= {"model", "ema", "masks", "optimizer"}
        for part, named in whole.tensors.items():
            for name, tensor in named.items():
                assert torch.equal(killed.tensors[part][name], tensor), (part, name)
        masks = torch_masks(load_model(dense)[0].encoder, rate, "global")
        assert_pruned(killed.tensors["model"], masks)
        assert_pruned(killed.tensors["ema"], masks)
