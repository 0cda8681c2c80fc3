"""Saving and loading checkpoints: they are complete or absent, and old ones are deleted."""

from __future__ import annotations

import random

import pytest
import safetensors.torch
import torch

from hpc_supcon import checkpoint
from hpc_supcon.checkpoint.save import _delete
from hpc_supcon.errors import CheckpointCorrupt


def save(folder, step, keep=2, **settings):
    tensors = {
        "model": {"w": torch.arange(6.0).view(2, 3) + step, "n": torch.tensor(step)},
        "rng": {"rank0.torch": torch.arange(9, dtype=torch.uint8)},
    }
    return checkpoint.save_checkpoint(
        folder, step, tensors, {"step": step}, world_size=2, config_digest="d", keep=keep, **settings
    )


def test_what_was_saved_is_read_back(tmp_path):
    path = save(tmp_path, 7)
    assert path == tmp_path / "step-7"
    found = checkpoint.load_checkpoint(path)
    assert found.state == {"step": 7}
    assert found.manifest["world_size"] == 2
    assert torch.equal(found.tensors["model"]["w"], torch.arange(6.0).view(2, 3) + 7)
    assert found.tensors["model"]["n"].item() == 7
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json", "model.safetensors", "rng.safetensors", "state.json",
    ]  # fmt: skip


def test_the_library_itself_reads_every_dtype_shape_and_layout(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    dtypes += [torch.int8, torch.uint8, torch.bool]
    chance = random.Random(0)
    named = {}
    for i in range(60):
        shape = [chance.randrange(0, 5) for _ in range(chance.randrange(0, 4))]
        named[f"layer.{i}/µ"] = (torch.randn(shape) * 9).to(chance.choice(dtypes))
    path = (
        checkpoint.save_checkpoint(tmp_path, 1, {"model": named}, {}, world_size=1, config_digest="")
        / "model.safetensors"
    )
    read = safetensors.torch.load_file(path)
    assert read.keys() == named.keys()
    for name, t in named.items():
        assert read[name].dtype == t.dtype
        assert torch.equal(read[name], t)


def test_the_values_of_slices_transposes_and_shared_memory_are_written(tmp_path):
    x = torch.arange(24.0).view(4, 6)
    named = {
        "t": x.t(),
        "row": x[1],
        "step": x[:, ::2],
        "again": x,
        "flip": x.flip(0),
        "expanded": x[:1].expand(3, 6),
    }
    path = checkpoint.save_checkpoint(tmp_path, 1, {"model": named}, {}, world_size=1, config_digest="")
    read = checkpoint.load_checkpoint(path).tensors["model"]
    assert all(torch.equal(read[name], t) for name, t in named.items())


def test_a_channels_last_tensor_keeps_its_values(tmp_path):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    path = checkpoint.save_checkpoint(tmp_path, 1, {"model": {"x": x}}, {}, world_size=1, config_digest="")
    assert torch.equal(checkpoint.load_checkpoint(path).tensors["model"]["x"], x)


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


def test_when_none_verifies_it_is_an_error_and_no_start_from_step_0(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointCorrupt, match="no older checkpoint"):
        checkpoint.load_newest(tmp_path)


def test_protected_steps_are_kept(tmp_path):
    for step in range(1, 7):
        checkpoint.save_checkpoint(
            tmp_path, step, {}, {"step": step}, world_size=1, config_digest="d", keep=2, protect={2, 6}
        )
    assert checkpoint.list_steps(tmp_path) == [2, 5, 6]


def test_every_kth_step_is_kept_for_good(tmp_path):
    for step in range(5, 61, 5):
        save(tmp_path, step, keep_every=20)
    assert checkpoint.list_steps(tmp_path) == [20, 40, 55, 60]


def damage(folder, step):
    path = folder / f"step-{step}" / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))


def test_damaged_checkpoints_never_replace_an_undamaged_one(tmp_path):
    """When a run was resumed from an older checkpoint, the damaged newest ones still exist, but do not count."""
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    damage(tmp_path, 20)
    damage(tmp_path, 30)
    save(tmp_path, 15)
    assert checkpoint.list_steps(tmp_path) == [10, 15, 20, 30]
    assert checkpoint.load_newest(tmp_path)[0].state["step"] == 15
    save(tmp_path, 20)
    save(tmp_path, 25)
    assert checkpoint.list_steps(tmp_path) == [20, 25, 30], "20 is undamaged again; 30 is not yet saved again"
    save(tmp_path, 30)
    assert checkpoint.list_steps(tmp_path) == [25, 30]


def test_a_trusted_checkpoint_is_not_read_again_but_its_sizes_are_checked(tmp_path):
    trusted = set()
    for step in (1, 2):
        save(tmp_path, step, trusted=trusted)
    assert trusted == {1, 2}
    (tmp_path / "step-2" / "state.json").unlink()
    save(tmp_path, 3, trusted=trusted)
    assert checkpoint.list_steps(tmp_path) == [1, 2, 3], "step 2 is not complete: step 1 is kept"


def test_saving_a_step_again_replaces_it(tmp_path):
    for value in (1.0, 2.0):
        save(tmp_path, 4)
        path = checkpoint.save_checkpoint(
            tmp_path, 5, {"model": {"w": torch.tensor(value)}}, {}, world_size=1, config_digest="d"
        )
    assert checkpoint.load_checkpoint(path).tensors["model"]["w"].item() == 2.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-4", "step-5"]


def test_a_checkpoint_that_is_deleted_while_it_is_read_does_not_count_as_damaged(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    original = checkpoint.load_checkpoint

    def vanishes(path):
        if path.name == "step-2":
            _delete(path)
            save(tmp_path, 3)
        return original(path)

    monkeypatch.setattr("hpc_supcon.checkpoint.load.load_checkpoint", vanishes)
    found, refused = checkpoint.load_newest(tmp_path)
    assert found.state["step"] == 3
    assert refused == []


def test_folders_with_other_names_are_not_listed(tmp_path):
    for name in ("step-", "step-01", "step--1", "step-1x", "xstep-1", "step-٣", ".partial-step-4", ".deleted-step-5"):
        (tmp_path / name).mkdir()
    (tmp_path / f"step-{'9' * 200}").mkdir()
    assert checkpoint.list_steps(tmp_path) == []
