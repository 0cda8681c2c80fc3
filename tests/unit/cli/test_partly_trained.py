"""Runs with adapters or frozen parts, from the command line: what is said, and what follows training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from hpc_supcon import checkpoint
from hpc_supcon.evaluation.encoder import load_model
from tests.commands import run
from tests.fault import runs

FAST = [
    "report.embeddings=false", "report.html=false", "data.source=synthetic",
    "data.synthetic={images: 60, classes: 3, channels: 3, image_size: 32}", "data.batch_size=16",
    "model.encoder=test_vit", "model.projection_hidden=16", "model.projection_dim=8", "train.iterations=4",
    "probe.kind=knn", "probe.knn.k=3", "probe.embedding=false", "log.tensorboard=false", "runtime.threads=1",
    "checkpoint.every_epochs=null", "checkpoint.every_steps=2", "checkpoint.keep_every_steps=2", "optim.lr=0.1",
]  # fmt: skip
LORA = "model.lora={rank: 2, alpha: 8}"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(a finished run with adapters, what it printed)"""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    stderr = runs.run(1, folder, *FAST[1:], LORA, stage="run", settings=FAST[:1])
    return folder, stderr


def test_the_log_says_how_much_is_trained(adapted):
    folder, stderr = adapted
    (start,) = runs.events(folder, "start")
    assert 0 < start["trained_parameters"] < 0.1 * start["parameters"]
    line = (
        f"trains {start['trained_parameters']:,} of {start['parameters']:,} parameters: adapters of rank 2 and heads"
    )
    assert f"{line}; the rest keeps its random weights: model.weights=null" in stderr


def test_what_follows_training_has_the_adapters_merged(adapted, capsys, tmp_path):
    folder, _ = adapted
    saved, _ = checkpoint.load_newest(folder / "checkpoints")
    assert any("lora_A" in name for name in saved.tensors["model"])
    model, found = load_model(folder)
    assert "lora" not in found.state
    want = timm.create_model("test_vit", num_classes=0, img_size=32).state_dict()
    assert model.encoder.state_dict().keys() == want.keys()
    name = "blocks.0.attn.qkv"
    base, a, b = (
        saved.tensors["model"][f"encoder.{name}.{part}.weight"]
        for part in ("base_layer", "lora_A.default", "lora_B.default")
    )
    torch.testing.assert_close(model.encoder.get_submodule(name).weight, base + 8 / 2 * b @ a)
    out = tmp_path / "encoder.safetensors"
    assert run(capsys, "export", str(folder), "--format", "safetensors", "-o", str(out))[0] == 0
    assert safetensors.torch.load_file(out).keys() == want.keys()
    assert run(capsys, "export", str(folder), "--format", "onnx", "-o", str(tmp_path / "encoder.onnx"))[0] == 0
    assert run(capsys, "probe", str(folder))[0] == 0
    assert run(capsys, "embeddings", str(folder), "report.methods=[pca]", "report.checkpoints=1")[0] == 0
    assert (folder / "embeddings/initial-encoder-pca.npz").exists()
    points = np.load(folder / "embeddings/encoder-pca.npz")["points"]
    assert np.isfinite(points).all()


@pytest.mark.parametrize("more", [[], ["prune.rewind=initial"], ["prune.rewind=step 2"]])
def test_pruning_starts_from_the_merged_encoder(adapted, capsys, more):
    folder, _ = adapted
    label = "-".join(more).partition("=")[2].replace(" ", "-") or "plain"
    finetune = ["prune.finetune.iterations=2", "prune.rate=0.5", f"prune.label={label}"]
    code, _, err = run(capsys, "prune", str(folder), *finetune, *more)
    assert code == 0, err
    (pruned,) = (folder / "pruned").glob(f"*{label}")
    saved, _ = checkpoint.load_newest(pruned / "checkpoints")
    assert saved.state["step"] == 2
    assert not [name for name in saved.tensors["model"] if "lora" in name]
    (start,) = runs.events(pruned, "start")
    assert start["trained_parameters"] == start["parameters"]


@pytest.mark.parametrize("more", [LORA, "model.train=[blocks.5, head]"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, more):
    settings = [*FAST, more, "deterministic=true", "train.ema=0.9"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.run(1, whole, settings=settings)
    it = runs.Run(1, killed, settings=settings, fault="kill@step=3")
    assert it.end() == [-9], it.stderr
    runs.run(1, killed, "--resume", settings=settings)
    assert runs.hashes(killed, 4) == runs.hashes(whole, 4)


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ([LORA, "model.train=[head]"], ["model.train", "model.lora.rank trains adapters and heads", "use one"]),
        (["model.lora.targets=[qkv]"], ["model.lora.targets", "set model.lora.rank"]),
        ([LORA, "model.lora.targets=[qvk]"], ["unknown layer 'qvk'; did you mean 'qkv'"]),
        ([LORA, "model.encoder=resnet18"], ["ResNet has no linear layer for an adapter", "model.lora.targets"]),
        (["model.lora.rank=0"], ["model.lora.rank", "greater than or equal to 1"]),
        (["model.lora={rang: 2}"], ["unknown key 'model.lora.rang'; did you mean 'model.lora.rank'?"]),
        (["model.train=[]"], ["model.train", "at least 1 item"]),
        (["model.train=[block.5]"], ["model.train: unknown module 'block.5'; did you mean 'blocks.5'"]),
        (["model.train=[patch_drop]"], ["model.train=[patch_drop]: these modules have no weights"]),
    ],
)
def test_wrong_settings_are_refused_before_the_folder_is_made(capsys, tmp_path, more, parts):
    code, _, err = run(capsys, "pretrain", "default", *FAST, *more, f"run_dir={tmp_path}/r")
    assert code == 2
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err
    assert not (tmp_path / "r").exists()


def test_a_part_is_trained_and_the_rest_is_as_it_was(capsys, tmp_path):
    code, _, _ = run(capsys, "pretrain", "default", *FAST, "model.train=[blocks.5]", f"run_dir={tmp_path}/r")
    assert code == 0
    first, last = (checkpoint.load_checkpoint(tmp_path / f"r/checkpoints/step-{n}") for n in (2, 4))
    changed = {n for n, t in first.tensors["model"].items() if not torch.equal(t, last.tensors["model"][n])}
    assert changed
    assert all(name.startswith("encoder.blocks.5.") for name in changed)
    assert json.loads((tmp_path / "r/metrics.jsonl").read_text().splitlines()[0])["trained_parameters"] > 0
