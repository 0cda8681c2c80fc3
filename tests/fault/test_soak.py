"""Runs that are killed and resumed several times; benchmarks/reliability.py does the same for longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_supcon import checkpoint

from .random_kills import random_kills, settings, soak
from .runs import STEPS_PER_EPOCH, hashes

EPOCHS = 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_random_kills_change_no_bit_of_the_result(tmp_path, uninterrupted, ranks):
    faults = random_kills(tmp_path / "r", ranks, 2, epochs=EPOCHS, seed=ranks)
    assert len(faults) == 2
    last = EPOCHS * STEPS_PER_EPOCH
    assert hashes(tmp_path / "r", last) == hashes(uninterrupted(ranks, *settings(EPOCHS)), last)


def shared_memory():
    """Files that PyTorch and Python leave in shared memory when they are killed at certain moments."""
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("torch_", "psm_", "mp-"))}


def test_nothing_is_left_behind_or_grows_over_kills(tmp_path):
    before = shared_memory()
    samples = soak(tmp_path / "r", 1, 2, epochs=10)
    last = [s for s in samples if s["process"] == samples[-1]["process"]]
    assert last[-1]["step"] == 60
    for what in ("descriptors", "threads", "python_threads"):
        assert len({s[what] for s in last[1:]}) <= 2, (what, [s[what] for s in last])
    assert shared_memory() <= before
    assert not list((tmp_path / "r" / "checkpoints").glob(".*"))
    assert len(checkpoint.list_steps(tmp_path / "r" / "checkpoints")) == 2
