"""A checkpoint is complete or absent, and every changed byte is seen."""

from __future__ import annotations

import errno
import json
import random
import shutil

import pytest
import torch

from hpc_supcon.errors import CheckpointCorrupt, RunFolderError
from hpc_supcon.training import checkpoint


def save(folder, step, keep=2):
    tensors = {
        "model": {"w": torch.arange(6.0).view(2, 3) + step, "n": torch.tensor(step)},
        "rng": {"rank0.torch": torch.arange(9, dtype=torch.uint8)},
    }
    return checkpoint.save(folder, step, tensors, {"step": step}, world_size=2, config_digest="d", keep=keep)


def test_what_was_saved_is_read_back(tmp_path):
    path = save(tmp_path, 7)
    assert path == tmp_path / "step-7"
    found = checkpoint.load(path)
    assert found.state == {"step": 7}
    assert found.manifest["world_size"] == 2
    assert torch.equal(found.tensors["model"]["w"], torch.arange(6.0).view(2, 3) + 7)
    assert found.tensors["model"]["n"].item() == 7
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json", "model.safetensors", "rng.safetensors", "state.json",
    ]  # fmt: skip


def test_a_channels_last_tensor_keeps_its_values(tmp_path):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    path = checkpoint.save(tmp_path, 1, {"model": {"x": x}}, {}, world_size=1, config_digest="")
    assert torch.equal(checkpoint.load(path).tensors["model"]["x"], x)


def test_the_newest_are_kept_and_partial_folders_do_not_count(tmp_path):
    for step in (5, 10, 100, 20):
        save(tmp_path, step)
    (tmp_path / ".partial-step-200").mkdir()
    assert checkpoint.list_steps(tmp_path) == [20, 100]
    newest, refused = checkpoint.load_newest(tmp_path)
    assert newest is not None
    assert newest.state["step"] == 100
    assert refused == []


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.load_newest(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "rng.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "extend", "zero", "delete"])
def test_every_damaged_file_is_detected_and_the_older_checkpoint_used(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    size = path.stat().st_size
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[: size // 2])
    elif damage == "extend":
        path.write_bytes(path.read_bytes() + b"\0")
    elif damage == "zero":
        path.write_bytes(bytes(size))
    else:
        path.unlink()
    found, refused = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found.state["step"] == 1
    assert len(refused) == 1
    assert name in refused[0]
    assert "\n" not in refused[0]


def test_300_random_bit_flips_are_all_detected(tmp_path):
    path = save(tmp_path, 3)
    files = sorted(path.iterdir())
    chance = random.Random(0)
    for _ in range(300):
        file = chance.choice(files)
        good = file.read_bytes()
        bad = bytearray(good)
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(CheckpointCorrupt):
            checkpoint.load(path)
        file.write_bytes(good)
    checkpoint.load(path)


def test_when_none_verifies_it_is_an_error_and_not_step_0(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointCorrupt, match="no older checkpoint"):
        checkpoint.load_newest(tmp_path)


def test_a_manifest_of_wrong_form_is_corrupt_not_a_crash(tmp_path):
    path = save(tmp_path, 1) / "manifest.json"
    for text in ("", "[]", "3", '{"files": 3}', json.dumps({"sha256": "x", "format": 1, "files": {}})):
        path.write_text(text)
        with pytest.raises(CheckpointCorrupt):
            checkpoint.load(path.parent)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_partial_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path, payload):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(RunFolderError, match=r"step-2: checkpoint not written: No space left on device"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    checkpoint.load(tmp_path / "step-1")


def test_a_crash_in_the_middle_of_a_save_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, 1)
    original, calls = checkpoint._write, []

    def dies(path, payload):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt  # as abrupt as a signal: no clean-up of ours runs
        return original(path, payload)

    monkeypatch.setattr(checkpoint, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    newest, _ = checkpoint.load_newest(tmp_path)
    assert newest is not None
    assert newest.state["step"] == 1
    save(tmp_path, 2)  # the left-over is swept away
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2"]
    shutil.rmtree(tmp_path)


def test_protected_steps_outlive_the_newest(tmp_path):
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, {}, {"step": step}, world_size=1, config_digest="d", keep=2, protect={2, 6})
    assert checkpoint.list_steps(tmp_path) == [2, 5, 6]
