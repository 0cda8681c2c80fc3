"""Agreement between processes: one of them writes in a run folder, and what a kill leaves behind is put right."""

from __future__ import annotations

import json
import socket
import time

import pytest

from hpc_supcon.run_lock import LOCK

from ..processes import RUN_TIMEOUT_S, Ranks
from .runs import STEPS, Run, events, hashes, run, steps

SAVED = ["log.tensorboard=true", "checkpoint.asynchronous=false"]
"""A checkpoint is on the disk before the next step, and so before the kill."""
ENDLESS = ["train.epochs=5000", "probe.kind=knn"]


@pytest.fixture
def running(tmp_path):
    """A run of two ranks that has saved a checkpoint and trains on."""
    folder = tmp_path / "r"
    it = Run(2, folder, *ENDLESS)
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while not list(folder.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline, it.stderr
        time.sleep(0.1)
    yield it
    it.kill()


def test_a_run_folder_belongs_to_one_process_until_that_ends_even_by_a_kill(running, tmp_path):
    folder, pid = running.folder, running.ranks[0].pid
    others = [
        Ranks([*running.arguments, "--resume"], tmp_path / "pretrain", 2),
        Ranks(["probe", str(folder)], tmp_path / "probe"),
        Ranks(["prune", str(folder), "prune.rate=0.5"], tmp_path / "prune"),
    ]
    for other in others:
        assert set(other.end()) == {2}
        (line,) = other.stderr.splitlines()
        assert f"{folder}: in use by process {pid} on {socket.gethostname()} (since " in line
    assert not (folder / "pruned").exists()
    assert len(events(folder, "start")) == 1

    running.kill()
    resumed = Run(2, folder, *ENDLESS, "--resume", fault="term@call=2")
    assert resumed.end() == [75, 75], resumed.stderr
    assert resumed.stderr.count(f"taken over from process {pid} on {socket.gethostname()}") == 1
    assert (folder / LOCK).read_bytes() == b"", "a preempted run has given its lock up"


def test_a_run_whose_last_line_was_torn_by_a_kill_is_finished_and_tells_no_step_twice(tmp_path, uninterrupted):
    folder, torn = tmp_path / "r", '{"event": "train", "step": 1'
    run(1, folder, *SAVED, fault="kill@step=12", code=-9)  # steps 8 to 11 are after the checkpoint
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(torn)
    told = run(1, folder, *SAVED, "--resume", stage="run")
    assert told.count("1 torn line moved to metrics.jsonl.torn") == 1
    assert steps(folder) == list(range(1, STEPS + 1))
    assert [event["step"] for event in events(folder, "start")] == [0, 7]
    assert (folder / "metrics.jsonl.torn").read_text() == torn + "\n"
    assert hashes(folder) == hashes(uninterrupted(1))
    assert json.loads((folder / "results.json").read_text())["results"]
