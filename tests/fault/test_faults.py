"""Whole runs with a fault during or after a save: resumed, they end with the same bits as without it."""

from __future__ import annotations

import json

import pytest

from hpc_supcon import checkpoint

from . import injector, runs
from .runs import Run, newest
from .test_resume import SETTINGS

EPOCHS, SAVED = 5, [7, 14, 21, 25]  # five steps to an epoch
# so that all that was saved before the fault is on disk
SYNCHRONOUS = "checkpoint.asynchronous=false"


def start(ranks, folder, *more, fault=""):
    """(exit code of rank 0, stderr of all ranks) of a run."""
    it = Run(ranks, folder, f"train.epochs={EPOCHS}", "checkpoint.keep=3", *more, fault=fault, settings=SETTINGS)
    return it.end()[0], it.stderr


def hashes(folder):
    return runs.hashes(folder, SAVED[-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Hashes of the last checkpoint of an uninterrupted run, by number of ranks."""
    made = {}

    def of(ranks):
        if ranks not in made:
            folder = tmp_path_factory.mktemp("whole") / str(ranks)
            code, stderr = start(ranks, folder)
            assert code == 0, stderr
            made[ranks] = hashes(folder)
        return made[ranks]

    return of


@pytest.mark.parametrize(
    ("ranks", "fault", "more", "saved"),
    [
        (1, "kill@step=14,phase=rename", [], 7),
        (1, "half@step=14,phase=write,call=9", [], 7),
        (1, "abort@step=21,phase=unlink", ["checkpoint.keep=2"], 21),
        (1, "raise@step=17", [SYNCHRONOUS], 14),
        (2, "kill@step=14,phase=fsync,call=2", [], 7),
    ],
)
def test_killed_in_a_save_and_resumed_equals_uninterrupted(tmp_path, whole, ranks, fault, more, saved):
    code, stderr = start(ranks, tmp_path / "r", *more, fault=fault)
    assert code != 0
    assert newest(tmp_path / "r") == saved, stderr
    code, stderr = start(ranks, tmp_path / "r", *more, "--resume")
    assert code == 0, stderr
    assert f"going on from step {saved}" in stderr
    assert hashes(tmp_path / "r") == whole(ranks)
    assert not list((tmp_path / "r" / "checkpoints").glob(".*"))


def test_a_run_survives_a_disk_that_is_full_for_a_while(tmp_path, whole):
    code, stderr = start(1, tmp_path / "r", fault="enospc@step=7,phase=write;eio@step=14,phase=fsync")
    assert code == 0, stderr
    lines = [line for line in stderr.splitlines() if "failed save" in line]
    assert len(lines) == 2
    assert "failed save 1 of 3" in lines[0]
    assert "step-7: checkpoint not written: No space left on device; it needs" in lines[0]
    assert "failed save 2 of 3" in lines[1]
    assert "Input/output error" in lines[1]
    assert checkpoint.list_steps(tmp_path / "r" / "checkpoints") == [21, 25]
    assert hashes(tmp_path / "r") == whole(1)


@pytest.mark.parametrize(
    ("ranks", "setting", "lines"), [(1, "checkpoint.max_failed_saves=1", 1), (2, "checkpoint.max_failed_saves=0", 0)]
)
def test_a_disk_that_stays_full_stops_every_rank_with_one_line(tmp_path, ranks, setting, lines):
    code, stderr = start(ranks, tmp_path / "r", setting, fault="enospc@phase=write,call=0")
    assert code == 2
    assert stderr.count("failed save") == lines
    errors = [line for line in stderr.splitlines() if line.startswith("hpc-supcon: error")]
    assert len(errors) == 1
    assert "checkpoint not written: No space left on device" in errors[0]
    events = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "train"
    assert checkpoint.list_steps(tmp_path / "r" / "checkpoints") == []


def test_the_last_save_of_a_run_may_not_fail(tmp_path):
    code, stderr = start(1, tmp_path / "r", fault="eacces@step=25,phase=mkdir")
    assert code == 2
    assert "step-25: checkpoint not written: Permission denied" in stderr.splitlines()[-1]
    assert newest(tmp_path / "r") == 21


def test_a_damaged_newest_checkpoint_is_named_and_not_used(tmp_path, whole):
    code, stderr = start(1, tmp_path / "r", SYNCHRONOUS, fault="flip@step=14,phase=saved;kill@step=20")
    assert code == -9, stderr
    code, stderr = start(1, tmp_path / "r", "--resume")
    assert code == 0, stderr
    lines = [line for line in stderr.splitlines() if "not used" in line]
    assert len(lines) == 1
    assert "step-14/model.safetensors: its bytes changed since it was written" in lines[0]
    assert "going on from step 7" in stderr
    assert hashes(tmp_path / "r") == whole(1)


def test_a_run_with_only_damaged_checkpoints_does_not_start_from_step_0(tmp_path):
    code, stderr = start(1, tmp_path / "r", SYNCHRONOUS, fault="kill@step=15")
    assert code == -9, stderr
    folder = tmp_path / "r" / "checkpoints"
    for step, how in ((7, "truncate"), (14, "flip")):
        injector.damage(folder / f"step-{step}" / "optimizer.safetensors", how)
    before = {p: p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}
    code, stderr = start(1, tmp_path / "r", "--resume")
    assert code == 2
    assert "step-14/optimizer.safetensors" in stderr
    assert "no older checkpoint is left to fall back on" in stderr
    assert {p: p.read_bytes() for p in folder.rglob("*.*") if p.is_file()} == before


def test_a_verified_checkpoint_of_another_model_is_a_named_error(tmp_path):
    """As after a change of the program, or in a forged file."""
    code, stderr = start(1, tmp_path / "r", SYNCHRONOUS, fault="kill@step=15")
    assert code == -9, stderr
    found = checkpoint.load_checkpoint(tmp_path / "r" / "checkpoints" / "step-14")
    del found.tensors["model"]
    checkpoint.save_checkpoint(
        found.path.parent, 14, found.tensors, found.state, world_size=1,
        config_digest=found.manifest["config_digest"],
    )  # fmt: skip
    code, stderr = start(1, tmp_path / "r", "--resume")
    assert code == 2
    assert stderr.splitlines()[-1].endswith("step-14: verified, but does not fit this run's model: 'model'")
