"""Resuming on another number of ranks is an error, or if it is allowed, every sample is served exactly once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hpc_supcon import checkpoint
from hpc_supcon.data.loaders.resident import ResidentLoader
from hpc_supcon.errors import Preempted

from . import injector
from .runs import STEPS, STEPS_PER_EPOCH, Run, newest, run

ALLOWED = "train.allow_world_size_change=true"


def log_indices():
    """The run, which writes a line for each batch of a step: step and indices, in a file for each process."""
    epoch = ResidentLoader.epoch

    def logged_epoch(self, number, start=0):
        for step, batch in enumerate(epoch(self, number, start), number * STEPS_PER_EPOCH + start + 1):
            with Path(os.environ["SERVED"], f"{os.getpid()}").open("a") as file:
                file.write(json.dumps([step, batch.index.tolist()]) + "\n")
            yield batch

    ResidentLoader.epoch = logged_epoch
    injector.main()


def served(folder, from_step, to_step):
    """{step: indices of all ranks} within the range."""
    steps = {}
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            step, index = json.loads(line)
            if from_step <= step <= to_step:
                steps.setdefault(step, []).extend(index)
    return steps


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (2, 4)])
def test_every_sample_of_the_epoch_is_still_served_exactly_once(tmp_path, before, after):
    folder, parts = tmp_path / "r", [tmp_path / "before", tmp_path / "after"]
    for part in parts:
        part.mkdir()
    run(
        before,
        folder,
        fault="usr2@step=8",
        code=Preempted.exit_code,
        main=log_indices,
        environment={"SERVED": str(parts[0])},
    )
    saved = newest(folder)
    assert saved % STEPS_PER_EPOCH, "in the middle of an epoch"
    stderr = run(after, folder, "--resume", ALLOWED, main=log_indices, environment={"SERVED": str(parts[1])})
    assert f"saved by {before} ranks, going on with {after}" in stderr
    batches = served(parts[0], 1, saved) | served(parts[1], saved + 1, STEPS)
    assert sorted(batches) == list(range(1, STEPS + 1))
    for first in range(1, STEPS, STEPS_PER_EPOCH):
        samples = [i for step in range(first, first + STEPS_PER_EPOCH) for i in batches[step]]
        assert len(samples) == len(set(samples)) == STEPS_PER_EPOCH * 12, "none twice, none left out"
    found = checkpoint.load_checkpoint(folder / "checkpoints" / f"step-{STEPS}")
    assert found.manifest["world_size"] == after


def test_unless_it_is_allowed_it_is_a_named_error_on_every_rank_and_changes_nothing(tmp_path):
    folder = tmp_path / "r"
    run(1, folder, fault="usr2@step=8", code=Preempted.exit_code)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    it = Run(2, folder, "--resume")
    assert it.end() == [2, 2]
    assert (
        it.stderr.count("saved by 1 ranks, resumed on 2; start 1 ranks, or set train.allow_world_size_change=true")
        == 1
    )
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
