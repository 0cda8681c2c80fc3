"""Rights that are missing and a /dev/shm that is too small: one line that names the place, and the exit code."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys

import pytest
from PIL import Image

from hpc_supcon.run_lock import run_lock

from ..processes import Ranks
from . import injector
from .runs import SETTINGS, run

DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2
NEW_MOUNTS = 0x00020000
CAPABILITIES_V3 = 0x20080522


def without_rights():
    """As an ordinary user: root may read and write everything, unless it gives that up."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", CAPABILITIES_V3, 0)
    data = ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    sets = list(struct.unpack("6I", data.raw))
    for k in (0, 1):  # effective and permitted
        sets[k] &= ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH)
    assert libc.capset(header, struct.pack("6I", *sets)) == 0
    injector.main()


def with_little_shared_memory():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS):
        sys.exit(99)
    for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", "size=4k", "none", "/dev/shm"]):
        if subprocess.run(command, check=False).returncode:
            sys.exit(99)
    injector.main()


def refused(arguments, stderr, main=without_rights):
    """The one line with which a command ends with exit code 2."""
    command = Ranks(arguments, stderr, main=main)
    assert command.end() == [2], command.stderr
    (line,) = command.stderr.splitlines()
    return line


def test_shared_memory_that_is_too_small_is_named_with_exit_code_4(tmp_path):
    settings = ["pretrain", "default", *SETTINGS, "data.loader=torch", f"run_dir={tmp_path}/r"]
    it = Ranks(settings, tmp_path / "stderr", main=with_little_shared_memory)
    (code,) = it.end()
    if code == 99:
        pytest.skip(f"NOT CHECKED on a real small /dev/shm: mounting is refused here ({it.stderr.strip()})")
    assert code == 4, it.stderr
    assert it.stderr.startswith("hpc-supcon: error: data.loader=torch: ")
    assert (
        "bytes of shared memory for its batches: No space left on device (28); give /dev/shm more space" in it.stderr
    )
    assert it.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "r"
    run(1, folder, "train.epochs=1", "probe.kind=knn", stage="run")
    return folder


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "cannot be written to: Permission denied"),
        (".lock", "cannot be written to: Permission denied"),
        ("config.yaml", "config.yaml: cannot be read: Permission denied"),
        ("results.json", "results.json: cannot be read: Permission denied"),
        ("checkpoints", "checkpoints: cannot be read: Permission denied"),
    ],
)
def test_a_run_folder_without_rights_is_named(trained, tmp_path, path, problem):
    (trained / path).chmod(0o555 if not path else 0)
    try:
        line = refused(["probe", str(trained)], tmp_path / "stderr")
    finally:
        (trained / path).chmod(0o755)
    assert line.startswith(f"hpc-supcon: error: {trained}")
    assert problem in line


def test_checkpoints_that_could_not_be_saved_are_named_before_training(trained, tmp_path):
    (trained / "checkpoints").chmod(0o555)
    try:
        settings = [*SETTINGS, "train.epochs=1", "probe.kind=knn", f"run_dir={trained}", "--resume"]
        line = refused(["pretrain", "default", *settings], tmp_path / "stderr")
    finally:
        (trained / "checkpoints").chmod(0o755)
    assert (
        line == f"hpc-supcon: error: {trained}/checkpoints: no right to write there, so no checkpoint could be saved"
    )


@pytest.mark.parametrize("part", ["", "train", "train/a", "train/a/1.png"])
@pytest.mark.parametrize("command", ["pretrain", "verify", "convert"])
def test_a_data_folder_without_rights_is_named(tmp_path, part, command):
    root = tmp_path / "data"
    for split in ("train", "test"):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (16, 16), (i * 9, 40, 90)).save(root / split / name / f"{i}.png")
    data = ["data.source=image_folder", f"data.root={root}", "data.image_size=16", "data.batch_size=4"]
    arguments = {
        "pretrain": ["pretrain", "default", *SETTINGS, *data, f"run_dir={tmp_path}/r"],
        "verify": ["verify", str(root)],
        "convert": ["convert", str(root), str(tmp_path / "out.beton")],
    }[command]
    (root / part).chmod(0)
    try:
        it = Ranks(arguments, tmp_path / "stderr", main=without_rights)
        assert it.end() == [2], it.stderr
    finally:
        (root / part).chmod(0o755)
    assert "Traceback" not in it.stderr
    assert str(root) in it.stderr or os.path.relpath(root) in it.stderr
    assert "ermission denied" in it.stderr or "not readable" in it.stderr or command == "verify"


def test_a_pruning_in_whose_folder_another_process_writes_is_refused(trained, tmp_path):
    folder = trained / "pruned" / "l1-global-0.5"
    with run_lock(folder, print):
        line = refused(["prune", str(trained), "prune.rate=0.5"], tmp_path / "stderr", main=injector.main)
    assert line.startswith(f"hpc-supcon: error: {folder}: in use by process {os.getpid()} on ")
    assert not (trained / "pruned").exists()


def test_a_run_folder_that_was_moved_is_locked_where_it_is_now(trained, tmp_path):
    moved, before = tmp_path / "moved", tmp_path / "before"
    shutil.copytree(trained, moved)
    config = moved / "config.yaml"
    config.write_text(config.read_text().replace(str(trained), str(before)))
    with run_lock(moved, print):
        line = refused(["probe", str(moved)], tmp_path / "stderr", main=injector.main)
    assert line.startswith(f"hpc-supcon: error: {moved}: in use by process {os.getpid()} on ")
    assert not before.exists()
