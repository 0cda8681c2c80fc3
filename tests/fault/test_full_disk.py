"""A disk that is full or read-only beside the checkpoints. Real ones, where this user may mount them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

from ..processes import Ranks
from . import injector
from .runs import hashes, run

SAVED = ["log.tensorboard=true", "checkpoint.asynchronous=false"]
"""A checkpoint is on the disk before the next step, and so before the kill."""
PROBE = ["probe.kind=knn", "data.loader=resident"]


def fill(disk):
    """Leave no byte on this disk."""
    free = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)


def remount(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


class Printing(Ranks):
    """A command whose stdout is kept in a file."""

    def __init__(self, folder, arguments):
        self.out = folder.with_suffix(".out")
        main = Redirected(str(self.out))
        super().__init__(arguments, folder.with_suffix(".stderr"), main=main)


class Redirected:
    def __init__(self, path):
        self.path = path

    def __call__(self):
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        injector.main()


@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_training_goes_on_while_the_log_and_the_plots_find_the_disk_full(small_disk, tmp_path, uninterrupted):
    folder, elsewhere = small_disk / "r", tmp_path / "checkpoints"
    run(1, folder, *SAVED, fault="kill@step=10", code=-9)
    shutil.move(folder / "checkpoints", elsewhere)
    (folder / "checkpoints").symlink_to(elsewhere)
    fill(small_disk)
    told = run(1, folder, *SAVED, "--resume", stderr=tmp_path / "stderr")
    for name in ("metrics.jsonl: not written", "tensorboard: not written", "plots/loss-pretrain.png: not written"):
        assert told.count(name) == 1, told
    assert "Traceback" not in told
    assert hashes(folder) == hashes(uninterrupted(1))


@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_results_that_find_the_disk_full_are_printed_and_the_exit_code_is_1(small_disk, tmp_path):
    folder = small_disk / "r"
    run(1, folder, *PROBE, stderr=tmp_path / "stderr")
    fill(small_disk)
    probe = Printing(tmp_path / "probe", ["probe", str(folder), "probe.kind=[knn, linear]", "probe.linear.epochs=1"])
    assert probe.end() == [1], probe.stderr
    printed = [json.loads(line) for line in probe.out.read_text().splitlines() if line.startswith("{")]
    assert [entry["probe"] for entry in printed] == ["knn", "linear"]
    assert all(entry["test"]["accuracy"] >= 0 for entry in printed)
    assert probe.stderr.count(f"{folder}/results.json: not written: No space left on device; the results") == 1
    assert "Traceback" not in probe.stderr


@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_a_run_folder_on_a_read_only_file_system_is_named(small_disk, tmp_path):
    folder = small_disk / "r"
    run(1, folder, *PROBE, "train.epochs=1", stderr=tmp_path / "stderr")
    remount(small_disk, "ro")
    for name, arguments in {"probe": [], "prune": ["prune.rate=0.5"]}.items():
        other = Ranks([name, str(folder), *arguments], tmp_path / name)
        assert other.end() == [2], other.stderr
        assert other.stderr == f"hpc-supcon: error: {folder}: cannot be written to: Read-only file system\n"
    listed = Ranks(["checkpoints", str(folder)], tmp_path / "checkpoints")
    assert listed.end() == [0], listed.stderr
