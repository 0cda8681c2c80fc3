"""A full, read-only or failing disk: earlier checkpoints stay, and the error names the bytes needed and free."""

from __future__ import annotations

import errno
import os
import re
import subprocess

import pytest
import torch

from hpc_supcon import checkpoint
from hpc_supcon.checkpoint import disk
from hpc_supcon.errors import RunFolderError

from .injector import CALLS, system_calls


def save(folder, step, numbers=1000, **settings):
    tensors = {"model": {"w": torch.full((numbers,), float(step))}, "rng": {"r": torch.arange(9.0)}}
    return checkpoint.save_checkpoint(folder, step, tensors, {}, world_size=1, config_digest="d", **settings)


def check_only(folder, step):
    found, refused = checkpoint.load_newest(folder)
    assert found.state["step"] == step
    assert refused == []
    assert [p.name for p in folder.iterdir()] == [f"step-{step}"]


class FailingCalls:
    """The `at`-th of the calls of these kinds fails."""

    def __init__(self, number, at, kinds=CALLS):
        self.number, self.at, self.kinds, self.count, self.hit = number, at, kinds, 0, None

    def __call__(self, name, args):
        if name in self.kinds:
            self.count += 1
            if self.count == self.at:
                self.hit = name
                raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("kind", ["mkdir", "open", "write", "fsync", "rename"])
def test_every_kind_of_failure_names_path_and_bytes_and_keeps_earlier_checkpoints(tmp_path, number, kind):
    save(tmp_path, 1)
    with (
        system_calls(FailingCalls(number, 1, (kind,))),
        pytest.raises(RunFolderError) as caught,
    ):
        save(tmp_path, 2)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/step-2: checkpoint not written: {os.strerror(number)}; it needs ")
    needed, free = (
        int(n.replace(",", "")) for n in re.search(r"needs ([\d,]+) bytes, ([\d,]+) are", message).groups()
    )
    assert 4036 < needed < 100_000
    assert free > 0
    assert " are free; earlier checkpoints are kept" in message
    assert "\n" not in message
    check_only(tmp_path, 1)
    save(tmp_path, 2)
    assert checkpoint.list_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("again", [False, True])
def test_an_error_in_any_one_call_loses_nothing(tmp_path, again):
    """The save is a named error, or it succeeds where only an old checkpoint could not be deleted."""
    at, hit = 1, []
    while True:
        folder = tmp_path / str(at)
        for step in (1, 2):
            save(folder, step)
        failing = FailingCalls(errno.EIO, at)
        with system_calls(failing):
            try:
                save(folder, 2 if again else 3)
            except RunFolderError:
                assert failing.hit != "unlink"
        if failing.hit is None:
            break
        hit.append(failing.hit)
        found, refused = checkpoint.load_newest(folder)
        assert found.state["step"] in ((2,) if again else (2, 3))
        assert refused == []
        save(folder, 9)
        assert sorted(p.name for p in folder.iterdir())[-1] == "step-9"
        assert not list(folder.glob(".*"))
        at += 1
    assert {"mkdir", "open", "write", "fsync", "rename", "unlink"} <= set(hit)


def test_a_disk_that_is_too_small_is_detected_before_a_byte_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 50_000)
    written = []
    with (
        system_calls(lambda name, args: written.append(name)),
        pytest.raises(RunFolderError, match=r"No space left on device; it needs .* bytes, 50,000 are free"),
    ):
        save(tmp_path, 2)
    assert not {"write", "mkdir"} & set(written)
    check_only(tmp_path, 1)


def test_a_full_file_system_keeps_the_earlier_checkpoint(small_disk, monkeypatch):
    folder = small_disk / "checkpoints"
    save(folder, 1, numbers=300_000)
    with pytest.raises(RunFolderError, match=r"No space left on device; it needs 1,\d+,\d+ bytes, \d{3},\d{3} are"):
        save(folder, 2, numbers=300_000)
    check_only(folder, 1)
    # without the check beforehand, the kernel fails in the middle of a file
    monkeypatch.setattr("hpc_supcon.checkpoint.save.check_space", lambda folder, needed: None)
    with pytest.raises(RunFolderError, match=r"step-2: checkpoint not written: No space left on device"):
        save(folder, 2, numbers=300_000)
    check_only(folder, 1)
    save(folder, 2, numbers=100_000)
    assert checkpoint.list_steps(folder) == [1, 2]


def test_a_read_only_file_system_keeps_the_earlier_checkpoint(small_disk):
    folder = small_disk / "checkpoints"
    save(folder, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(RunFolderError, match=r"step-2: checkpoint not written: Read-only file system"):
        save(folder, 2)
    check_only(folder, 1)
