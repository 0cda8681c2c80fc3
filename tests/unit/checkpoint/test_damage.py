"""Every changed byte of a checkpoint is detected, and the older one is used, with a message of one line."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

from hpc_supcon import checkpoint
from hpc_supcon.checkpoint.disk import unseal
from hpc_supcon.checkpoint.load import problem_of
from hpc_supcon.errors import CheckpointCorrupt

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    for step in (1, 2):
        tensors = {
            "model": {"a": torch.arange(60.0) + step, "b": torch.full((3, 4), step), "c": torch.tensor(step)},
            "optimizer": {"a/momentum": torch.arange(60.0) * step},
            "rng": {"rank0.torch": torch.arange(200, dtype=torch.uint8) + step},
        }
        state = {"classes": ["x", "y"], "normalization": {"mean": [0.5], "std": [0.25]}}
        checkpoint.save_checkpoint(folder, step, tensors, state, world_size=1, config_digest="d")
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def header_end(path):
    payload = path.read_bytes()
    return 8 + int.from_bytes(payload[:8], "little") if path.suffix == ".safetensors" else len(payload) // 3


CUTS = {
    "to nothing": lambda path, size: 0,
    "to one byte": lambda path, size: 1,
    "within the first eight bytes": lambda path, size: 7,
    "within the header": lambda path, size: header_end(path) // 2,
    "after the header": lambda path, size: header_end(path),
    "in the middle": lambda path, size: size // 2,
    "to whole numbers, some short": lambda path, size: size - 8,
    "by one byte": lambda path, size: size - 1,
}


def other(path):
    return path.parent.parent / "step-1" / path.name


DAMAGE = {
    **{f"cut {where}": lambda p, at=at: p.write_bytes(p.read_bytes()[: at(p, p.stat().st_size)])
       for where, at in CUTS.items()},
    "zero-filled": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "zero from the middle": lambda p: p.write_bytes(
        p.read_bytes()[: p.stat().st_size // 2] + bytes(p.stat().st_size - p.stat().st_size // 2)
    ),
    "extended": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "extended by a space": lambda p: p.write_bytes(p.read_bytes() + b" "),
    "deleted": lambda p: p.unlink(),
    "of another step": lambda p: shutil.copy(other(p), p),
    "a link to another step's": lambda p: (p.unlink(), p.symlink_to(other(p))),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", DAMAGE)
def test_every_damaged_file_is_named_and_the_older_checkpoint_is_used(folder, name, how):
    DAMAGE[how](folder / "step-2" / name)
    found, refused = checkpoint.load_newest(folder)
    assert found.state["step"] == 1
    assert len(refused) == 1
    assert str(folder / "step-2" / name) in refused[0]
    assert "\n" not in refused[0]
    assert problem_of(folder / "step-2") == refused[0]


def test_a_link_to_an_undamaged_file_outside_is_not_followed(folder, tmp_path):
    path = folder / "step-2" / "model.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors: a link, not a file"):
        checkpoint.load_checkpoint(path.parent)


def test_a_complete_checkpoint_with_the_name_of_another_step_is_refused(folder):
    shutil.copytree(folder / "step-1", folder / "step-9")
    found, refused = checkpoint.load_newest(folder)
    assert found.state["step"] == 2
    assert refused == [f"{folder}/step-9/manifest.json: is that of step 1"]


def test_1000_random_bit_flips_are_all_detected(folder):
    path, chance = folder / "step-2", random.Random(0)
    good = {name: (path / name).read_bytes() for name in FILES}
    for _ in range(1000):
        name = chance.choice(FILES)
        bad = bytearray(good[name])
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        (path / name).write_bytes(bad)
        found, refused = checkpoint.load_newest(folder)
        assert found.state["step"] == 1
        assert len(refused) == 1
        assert name in refused[0]
        (path / name).write_bytes(good[name])
    assert checkpoint.load_newest(folder)[0].state["step"] == 2


def test_every_bit_of_the_manifest_counts(folder):
    good = (folder / "step-2" / "manifest.json").read_bytes()
    unseal(good)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            unseal(bytes(bad))


def test_a_file_that_the_manifest_does_not_name_is_never_opened(folder):
    (folder / "step-2" / "extra.safetensors").write_bytes(b"not one")
    (folder / "step-2" / "pipe.json").symlink_to("/dev/zero")
    assert sorted(checkpoint.load_checkpoint(folder / "step-2").tensors) == ["model", "optimizer", "rng"]


def test_when_all_are_damaged_it_is_an_error_and_not_step_0(folder):
    for step in (1, 2):
        (folder / f"step-{step}" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointCorrupt, match=r"step-2/model.* no older checkpoint is left"):
        checkpoint.load_newest(folder)
