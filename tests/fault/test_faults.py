"""Whole runs with a fault in or after a save, resumed: the same bits as never interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

from hpc_supcon.training import checkpoint

from .injector import damage
from .test_resume import SETTINGS

EPOCHS, SAVED = 5, [7, 14, 21, 25]  # five steps to an epoch


def start(ranks, folder, *more, fault=""):
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, "-m", "tests.fault.injector", "pretrain", "default", *SETTINGS]
    return subprocess.run(
        [*command, f"train.epochs={EPOCHS}", "checkpoint.keep=3", f"run_dir={folder}", *more],
        env={**os.environ, "HPC_SUPCON_FAULT": fault},
        capture_output=True,
        text=True,
        check=False,
    )


def hashes(folder):
    path = folder / "checkpoints" / f"step-{SAVED[-1]}"
    checkpoint.load(path)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.glob("*.safetensors")}


def newest(folder):
    return checkpoint.load_newest(folder / "checkpoints")[0].state["step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Hashes of the last checkpoint of an uninterrupted run, by number of ranks."""
    made = {}

    def of(ranks):
        if ranks not in made:
            folder = tmp_path_factory.mktemp("whole") / str(ranks)
            done = start(ranks, folder)
            assert done.returncode == 0, done.stderr
            made[ranks] = hashes(folder)
        return made[ranks]

    return of


@pytest.mark.parametrize(
    ("ranks", "fault", "left"),
    [
        (1, "kill@step=14,phase=rename", 7),
        (1, "half@step=14,phase=write,call=9", 7),
        (1, "abort@step=21,phase=unlink", 21),
        (2, "kill@step=14,phase=fsync,call=2", 7),
        (2, "kill@rank=1,step=18", 14),
    ],
)
def test_killed_in_a_save_and_resumed_equals_uninterrupted(tmp_path, whole, ranks, fault, left):
    more = ["checkpoint.keep=2"] if left == 21 else []
    killed = start(ranks, tmp_path / "r", *more, fault=fault)
    assert killed.returncode != 0
    assert newest(tmp_path / "r") == left
    done = start(ranks, tmp_path / "r", *more, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"going on from step {left}" in done.stderr
    assert hashes(tmp_path / "r") == whole(ranks)
    assert not list((tmp_path / "r" / "checkpoints").glob(".*"))


def test_a_disk_that_is_full_for_a_while_is_outlived(tmp_path, whole):
    done = start(1, tmp_path / "r", fault="enospc@step=7,phase=write;eio@step=14,phase=fsync")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "failed save" in line]
    assert len(told) == 2
    assert "failed save 1 of 3" in told[0]
    assert "step-7: checkpoint not written: No space left on device; it needs" in told[0]
    assert "failed save 2 of 3" in told[1]
    assert "Input/output error" in told[1]
    assert checkpoint.list_steps(tmp_path / "r" / "checkpoints") == [21, 25]
    assert hashes(tmp_path / "r") == whole(1)


@pytest.mark.parametrize(
    ("ranks", "setting", "lines"),
    [(1, "checkpoint.max_failed_saves=1", 1), (2, "checkpoint.asynchronous=false", 3)],
)
def test_a_disk_that_stays_full_stops_every_rank_with_one_line(tmp_path, ranks, setting, lines):
    done = start(ranks, tmp_path / "r", setting, fault="enospc@phase=write,call=0")
    assert done.returncode != 0
    assert done.stderr.count("failed save") == lines
    errors = [line for line in done.stderr.splitlines() if line.startswith("hpc-supcon: error")]
    assert len(errors) == 1
    assert "checkpoint not written: No space left on device" in errors[0]
    assert "Traceback" not in errors[0]
    assert done.returncode == 2 or "exitcode  : 2" in done.stderr
    events = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "train"


def test_a_damaged_newest_checkpoint_is_not_used_and_named(tmp_path, whole):
    killed = start(1, tmp_path / "r", fault="flip@step=14,phase=saved;kill@step=20")
    assert killed.returncode == -9
    done = start(1, tmp_path / "r", "--resume")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "not used" in line]
    assert len(told) == 1
    assert "step-14/model.safetensors: its bytes changed since it was written" in told[0]
    assert "going on from step 7" in done.stderr
    assert hashes(tmp_path / "r") == whole(1)


def test_with_all_damaged_the_run_does_not_start_from_step_0(tmp_path):
    assert start(1, tmp_path / "r", fault="kill@step=15").returncode == -9
    folder = tmp_path / "r" / "checkpoints"
    for step, how in ((7, "truncate"), (14, "flip")):
        damage(folder / f"step-{step}" / "optimizer.safetensors", how)
    before = {p: p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}
    done = start(1, tmp_path / "r", "--resume")
    assert done.returncode == 2
    assert "step-14/optimizer.safetensors" in done.stderr
    assert "no older checkpoint is left to fall back on" in done.stderr
    assert {p: p.read_bytes() for p in folder.rglob("*.*") if p.is_file()} == before
