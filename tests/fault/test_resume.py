"""A run that is killed after a checkpoint and resumed ends with the same bits as an uninterrupted one."""

from __future__ import annotations

import time

import pytest

from hpc_supcon import checkpoint

from ..processes import RUN_TIMEOUT_S
from . import runs
from .runs import Run, events

SETTINGS = [
    "data.source=synthetic", "data.synthetic={images: 90, classes: 3, channels: 3, image_size: 16}",
    "data.batch_size=16", "model.encoder=conv", "model.projection_hidden=32", "model.projection_dim=16",
    "train.epochs=12", "checkpoint.every_epochs=null", "checkpoint.every_steps=7", "log.every_steps=1",
    "log.tensorboard=false", "deterministic=true", "optim.warmup_epochs=1", "runtime.threads=1",
    "optim.clip_norm=1", "train.ema=0.9", "runtime.device=cpu",
]  # fmt: skip
STEPS_PER_EPOCH = 81 // 16
STEPS = 12 * STEPS_PER_EPOCH


def kill_after_a_checkpoint(ranks, folder, *more, last, settings=SETTINGS):
    """Start, wait for a checkpoint newer than what is there, SIGKILL every rank at whatever it does; the newest step.

    The run never gets beyond step `last`, so that the kill cannot come too late.
    """
    seen = checkpoint.list_steps(folder / "checkpoints")
    it = Run(ranks, folder, *more, fault=f"hang@step={last + 1}", settings=settings)
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while checkpoint.list_steps(folder / "checkpoints") == seen:
        assert time.monotonic() < deadline, it.stderr
        time.sleep(0.001)
    it.kill()
    return checkpoint.list_steps(folder / "checkpoints")[-1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, ranks):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.run(ranks, whole, settings=SETTINGS)
    killed_at = [kill_after_a_checkpoint(ranks, killed, last=STEPS // 2)]
    killed_at.append(kill_after_a_checkpoint(ranks, killed, "--resume", last=STEPS - 1))
    assert killed_at[0] < killed_at[1] < STEPS
    assert any(step % STEPS_PER_EPOCH for step in killed_at), "some kill is in the middle of an epoch"
    stderr = runs.run(ranks, killed, "--resume", settings=SETTINGS)
    assert f"going on from step {killed_at[1]}" in stderr
    assert runs.hashes(killed, STEPS) == runs.hashes(whole, STEPS)

    def losses(folder):
        return {event["step"]: event["loss"] for event in events(folder, "train")}

    assert losses(killed) == losses(whole)
