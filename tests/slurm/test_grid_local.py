"""Grids without Slurm: on submitit's local executor, as packed jobs, and in this process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from hpc_supcon.grid.folder import read_record, submitted_jobs

from ..processes import Ranks
from .grids import LONG, grid, processes_of, states, wait_for, wait_for_checkpoint, weights, write_grid, write_profile

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def here(monkeypatch, request):
    """Child processes import this checkout and use one thread."""
    monkeypatch.setenv("PYTHONPATH", f"{request.config.rootpath}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def good_and_bad(folder):
    """An axis with a cell that can be trained and one whose images do not exist."""
    missing = {"data.source": "image_folder", "data.root": str(folder / "images"), "data.image_size": 16}
    return {"data": {"good": {"seed": 1}, "bad": {**missing, "seed": 2}}}


def test_a_grid_with_two_ranks_and_a_failing_cell_runs_to_the_report(here, tmp_path):
    two_ranks = {"cells": {"data": "good"}, "pretrain": {"tasks": 2}}
    path = write_grid(tmp_path, "g", axes=good_and_bad(tmp_path), resources={"where": [two_ranks]})
    folder = tmp_path / "a b" / "g"
    told = grid("submit", path, "--profile", write_profile(tmp_path, cluster="local", parallel=2), "--dir", folder)
    assert "2 done, 1 failed, 1 blocked" in told
    assert states(folder) == {
        "good.pretrain": "done", "good.probe": "done", "bad.pretrain": "failed", "bad.probe": "blocked",
    }  # fmt: skip
    metrics = (folder / "runs" / "good" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["world_size"] == 2
    assert str(tmp_path / "images") in grid("status", folder)
    assert f"image folder {tmp_path / 'images'} does not exist" in grid("logs", folder, "bad.pretrain")
    grid("report", folder)
    table = (folder / "report" / "report.md").read_text()
    assert table.count("missing") == 4


def test_packed_runs_share_a_job_and_one_that_fails_stops_no_other(here, tmp_path):
    path, folder = write_grid(tmp_path, "g", axes=good_and_bad(tmp_path), pack=2), tmp_path / "g"
    grid("submit", path, "--cluster", "local", "--dir", folder)
    assert len(set(submitted_jobs(folder).values())) == 2, "one job for each stage"
    assert states(folder) == {
        "good.pretrain": "done", "good.probe": "done", "bad.pretrain": "failed", "bad.probe": "blocked",
    }  # fmt: skip


def test_a_job_that_is_sent_a_signal_starts_again_and_ends_with_the_same_weights(here, uninterrupted, tmp_path):
    path, folder = write_grid(tmp_path, "g", set=LONG), tmp_path / "local"
    command = [
        sys.executable,
        "-m",
        "hpc_supcon",
        "grid",
        "submit",
        str(path),
        "--cluster",
        "local",
        "--dir",
        str(folder),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        wait_for_checkpoint(folder / "runs" / "cell")
        os.kill(read_record(folder, "cell.pretrain").pid, signal.SIGUSR2)
        assert process.wait() == 0
    assert set(states(folder).values()) == {"done"}
    assert len(read_record(folder, "cell.pretrain").requeues) == 1
    assert weights(folder / "runs" / "cell") == uninterrupted
    assert "going on from step" in grid("logs", folder, "cell.pretrain")


def test_an_interrupted_pruning_resumes_and_ends_with_the_same_weights(here, tmp_path):
    tuned = {"prune.finetune.epochs": 30}
    path, folder = write_grid(tmp_path, "g", set=tuned, axes={"prune.rate": [None, 0.5]}), tmp_path / "local"
    command = [sys.executable, "-m", "hpc_supcon", "grid", "submit", path, "--cluster", "local", "--dir", folder]
    pruned = folder / "runs" / "rate-0.5" / "pruned" / "l1-global-0.5"
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL) as process:
        wait_for_checkpoint(pruned)
        os.kill(read_record(folder, "rate-0.5.prune").pid, signal.SIGUSR2)
        assert process.wait() == 0
    assert set(states(folder).values()) == {"done"}, grid("status", folder)
    assert len(read_record(folder, "rate-0.5.prune").requeues) == 1
    assert "going on from step" in grid("logs", folder, "rate-0.5.prune")
    dense, again = folder / "runs" / "rate-0.5", tmp_path / "again"
    again.mkdir()
    shutil.copy(dense / "config.yaml", again)
    (again / "checkpoints").symlink_to(dense / "checkpoints")
    uninterrupted = Ranks(["prune", str(again)], tmp_path / "stderr")
    assert uninterrupted.end() == [0], uninterrupted.stderr
    assert weights(pruned) == weights(again / pruned.relative_to(dense))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_local_jobs_end_with_the_process_that_runs_the_grid_and_resume_later(here, uninterrupted, tmp_path, how):
    path, folder = write_grid(tmp_path, "g", set=LONG), tmp_path / "local"
    # with a variable to set, submitit starts the job through a shell
    profile = write_profile(tmp_path, cluster="local", environment={"A": "b"})
    command = [sys.executable, "-m", "hpc_supcon", "grid", "submit", path, "--profile", profile, "--dir", folder]
    with subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        wait_for_checkpoint(folder / "runs" / "cell")
        meanwhile = states(folder)
        # Ctrl-C reaches every process of the terminal, SIGKILL only the one it is sent to
        (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
        told = process.stdout.read()
    assert process.returncode == (130 if how == signal.SIGINT else -how), (meanwhile, told)
    assert ("submit again" in told, "Traceback" in told) == (how == signal.SIGINT, False)
    assert meanwhile == {"cell.pretrain": "running", "cell.probe": "pending"}
    wait_for(lambda: not processes_of(folder))
    assert states(folder) == {"cell.pretrain": "cancelled", "cell.probe": "missing"}
    assert "saved at step" in grid("logs", folder, "cell.pretrain")
    grid("submit", path, "--profile", profile, "--dir", folder)
    assert set(states(folder).values()) == {"done"}
    assert weights(folder / "runs" / "cell") == uninterrupted
