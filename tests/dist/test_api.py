"""The Python API on two ranks, several calls in one process: the numbers of one process, and one decision for all."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import hpc_supcon as hs
from hpc_supcon.errors import CallbackError
from tests.processes import Ranks
from tests.unit.api.conftest import FAST, Tiny
from tests.unit.api.test_objects import supcon

SETTINGS = {**FAST, "runtime.threads": 1, "train.iterations": 4, "log.every_steps": 1}


class Watcher(hs.Callback):
    """Sees every step; rank 1 stops the training after the third."""

    def __init__(self):
        self.seen = []

    def on_step(self, step, metrics):
        self.seen.append([step, metrics["loss"], metrics["images_per_s"]])
        if step == 3 and os.environ.get("RANK", "1") == "1":
            raise hs.StopTraining("rank 1 has seen enough")


class Broken(hs.Callback):
    def on_epoch(self, epoch, metrics):
        if os.environ["RANK"] == "1":
            raise ValueError("no display")


def train(folder):
    watcher = Watcher()
    run = hs.pretrain("quickstart", run_dir=folder, settings=SETTINGS, encoder=Tiny, loss=supcon, callbacks=[watcher])
    return run, watcher


def main():
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    run, watcher = train(folder / "run")
    left = dist.is_initialized()
    rows = hs.probe(run, "knn")
    try:
        hs.pretrain("quickstart", run_dir=folder / "broken", settings=SETTINGS, callbacks=[Broken()])
        error = "none"
    except CallbackError as raised:
        error = str(raised)
    report = hs.report(run)
    facts = {"seen": watcher.seen, "left": left, "knn": rows[0]["test"]["accuracy"], "error": error}
    facts["sum"] = float(run.embed(torch.full((1, 1, 8, 8), 9, dtype=torch.uint8)).double().sum())
    (folder / f"{rank}.json").write_text(json.dumps({**facts, "report": str(report)}))


def test_two_ranks_train_stop_and_probe_as_one(tmp_path):
    ranks = Ranks([str(tmp_path)], tmp_path / "stderr", 2, main=main)
    assert ranks.end() == [0, 0], ranks.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert [step for step, *_ in first["seen"]] == [1, 2, 3]
    assert not first["left"]
    assert "rank 1: callback Broken.on_epoch raised ValueError at 1: no display" in first["error"]
    assert Path(first["report"]).is_file()
    alone, watcher = train(tmp_path / "alone")
    assert first["seen"][0][1] == pytest.approx(watcher.seen[0][1], rel=0.2), "more than by other views"
    assert alone.metrics.column("step") == [1, 2, 3]
