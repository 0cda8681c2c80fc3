"""`hpc-supcon prune` with prune.method=channels: the smaller run folder, and every command that reads it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from hpc_supcon import checkpoint
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.export import load_part
from hpc_supcon.pruning import load_sparse, mask_channels
from hpc_supcon.run_folder import read_config
from hpc_supcon.stages.prune import SPARSE
from hpc_supcon.stages.pruned_channels import PLAN
from tests.commands import run, succeed
from tests.unit.cli.test_prune import FAST, results_of

CHANNELS = ["prune.method=channels", "prune.scope=layer", "probe.kind=[knn]", "prune.latency.batch_sizes=[]"]
WIDTHS = {"convs.0": [16, 1], "convs.1": [16], "convs.3": [32, 16], "convs.4": [32], "convs.6": [64, 32],
          "convs.7": [64], "latent": [128, 64]}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A dense run, which tests must not change; its best weights are averages."""
    folder = tmp_path_factory.mktemp("dense") / "r"
    succeed(
        "run",
        "default",
        *FAST,
        "probe.kind=[knn]",
        "checkpoint.keep_every_steps=4",
        "checkpoint.every_steps=4",
        f"run_dir={folder}",
    )
    return folder


@pytest.fixture
def dense(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "r")


def prune(capsys, folder, *settings, code=0):
    found, out, err = run(capsys, "prune", folder, *CHANNELS, *settings)
    assert found == code, err
    return results_of(folder) if code == 0 else err, out


def images_of(found, n=5):
    encoder = found.state["encoder"]
    size = encoder["image_size"]
    return torch.randn(n, encoder["in_channels"], size, size, generator=torch.Generator().manual_seed(0))


def widths_of(folder):
    found = checkpoint.load_newest(folder / "checkpoints")[0]
    return found.state["encoder"]["channels"]


@torch.no_grad()
def test_the_run_folder_has_a_smaller_model_with_the_outputs_of_the_masked_one(capsys, dense):
    entries, out = prune(capsys, dense, "prune.rate=0.5", "prune.latency={batch_sizes: [1, 7], seconds: 0.01}")
    (entry,) = entries
    folder = dense / entry["folder"]
    assert folder.name == "channels-layer-0.5"
    assert widths_of(folder) == WIDTHS
    assert {name: list(sizes) for name, sizes in read_config(folder).model.channels.items()} == WIDTHS
    model, found = load_model(dense)
    smaller, _ = load_model(folder)
    mask_channels(model.encoder, json.loads((folder / PLAN).read_text()))
    images = images_of(found)
    torch.testing.assert_close(smaller.eval().encoder(images), model.eval().encoder(images), rtol=1e-5, atol=1e-5)
    size, cost = entry["size"], entry["cost"]
    assert cost["parameters"] == sum(p.numel() for p in smaller.encoder.parameters()) < cost["dense_parameters"]
    # positions of the three maps of 8 px images, and the linear layer
    macs = 16 * 9 * 16 + 4 * 9 * 16 * 32 + 9 * 32 * 64 + 64 * 128
    assert cost["macs"] == cost["nonzero_macs"] == macs
    assert cost["dense_macs"] == 16 * 9 * 32 + 4 * 9 * 32 * 64 + 9 * 64 * 128 + 128 * 128
    assert list(cost["latency"]) == ["dense", "channels"]
    assert list(cost["latency"]["channels"]) == ["1", "7"]
    assert cost["latency"]["channels"]["7"]["median_ms"] > 0
    assert "times faster" in out
    assert size["ratio_dense"] == round(size["original_bytes"] / size["dense_bytes"], 4) > 2
    stored = load_sparse(folder / SPARSE)
    assert all(torch.equal(t, stored[name]) for name, t in smaller.encoder.state_dict().items())


def test_every_command_reads_the_smaller_model(capsys, dense, tmp_path):
    prune(capsys, dense, "prune.rate=0.5")
    folder = dense / "pruned/channels-layer-0.5"
    model, found = load_model(folder)
    images = images_of(found)
    expected = model.eval().encoder(images).detach()
    code, _, err = run(capsys, "probe", folder, "probe.kind=[linear, finetune]", "probe.linear.iterations=5",
                       "probe.finetune.epochs=1")  # fmt: skip
    assert code == 0, err
    assert {r["probe"] for r in results_of(folder, "probe")} >= {"linear", "finetune"}
    onnx = tmp_path / "small.onnx"
    code, _, err = run(capsys, "export", folder, "--format", "onnx", "--out", onnx)
    assert code == 0, err
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx)
    norm = found.state["normalization"]
    pixels = images * norm["std"][0] + norm["mean"][0]
    np.testing.assert_allclose(session.run(None, {"images": pixels.numpy()})[0], expected, rtol=1e-4, atol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["description"])["encoder"]["channels"] == WIDTHS
    metadata = session.get_modelmeta().custom_metadata_map
    assert "channels=" in metadata["rebuild"]
    for part, probe in (("projection", None), ("classifier", "finetune"), ("classifier", "linear")):
        out = load_part(folder, part, probe)(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
        assert torch.isfinite(out).all()
    torch.testing.assert_close(load_part(folder, "encoder").module(images), expected)


def test_fine_tuning_goes_on_where_it_stopped(capsys, dense):
    tune = ["prune.rate=0.5", "prune.finetune.iterations=6", "checkpoint.every_steps=3", "checkpoint.keep=2"]
    entries, _ = prune(capsys, dense, *tune)
    folder = dense / entries[0]["folder"]
    assert (entries[0]["prune"]["finetune_steps"], widths_of(folder)) == (6, WIDTHS)
    whole = checkpoint.load_newest(folder / "checkpoints")[0].tensors["model"]
    shutil.rmtree(folder / "checkpoints/step-6")
    entries, _ = prune(capsys, dense, *tune, "--resume")
    again = checkpoint.load_newest(folder / "checkpoints")[0]
    assert again.state["step"] == 6
    assert all(torch.equal(t, again.tensors["model"][name]) for name, t in whole.items())
    # the run folder stands by itself: its own settings build the model
    shutil.rmtree(folder / "checkpoints/step-6")
    code, _, err = run(capsys, "pretrain", folder / "config.yaml", "--resume")
    assert code == 0, err
    again = checkpoint.load_newest(folder / "checkpoints")[0]
    assert all(torch.equal(t, again.tensors["model"][name]) for name, t in whole.items())
    said, _ = prune(capsys, dense, *tune, "prune.channels.batches=9", "--resume", code=2)
    assert "was pruned with other settings (prune.channels.batches: 8 -> 9)" in said


def test_resuming_keeps_the_channels_that_were_chosen(capsys, dense):
    """Scores that differ in the last bit, as gradients of a GPU may, must not change the shapes of a training."""
    tune = ["prune.rate=0.5", "prune.finetune.iterations=4", "checkpoint.every_steps=2", "checkpoint.keep=2"]
    entries, _ = prune(capsys, dense, *tune)
    folder = dense / entries[0]["folder"]
    shutil.rmtree(folder / "checkpoints/step-4")
    plan = json.loads((folder / PLAN).read_text())
    kept = plan["convs.0.weight"][0]
    other = sorted(set(range(32)) - set(kept))[:16]
    text = json.dumps({name: [other if d == kept else d for d in dims] for name, dims in plan.items()})
    (folder / PLAN).write_text(text)
    entries, _ = prune(capsys, dense, *tune, "--resume")
    assert entries[0]["prune"]["finetune_steps"] == 4
    assert (folder / PLAN).read_text() == text
    for wrong, said in (
        ("{", "cannot be read"),
        ("[]", "is no plan"),
        ('{"latent.weight": [[999]]}', "does not fit"),
    ):
        (folder / PLAN).write_text(wrong)
        err, _ = prune(capsys, dense, *tune, "--resume", code=2)
        assert f"{PLAN}: {said}" in err


def test_rounds_remove_channels_of_the_round_before(capsys, dense):
    entries, _ = prune(
        capsys, dense, "prune.rate=0.75", "prune.schedule=iterative", "prune.steps=2", "prune.finetune.iterations=2"
    )
    assert [widths_of(dense / e["folder"])["convs.6"] for e in entries] == [[64, 32], [32, 16]]
    assert [e["prune"]["rate"] for e in entries] == [0.5, 0.75]


def test_taylor_scores_choose_by_the_loss(capsys, dense):
    entries, _ = prune(
        capsys, dense, "prune.rate=0.5", "prune.channels={score: taylor, batches: 2}", "prune.loss=cross_entropy",
        "probe.linear.iterations=5", "prune.label=taylor",
    )  # fmt: skip
    assert entries[0]["prune"]["loss"] == "cross_entropy"
    folder = dense / entries[0]["folder"]
    assert widths_of(folder) == WIDTHS
    prune(capsys, dense, "prune.rate=0.5")
    by_l1 = load_model(dense / "pruned/channels-layer-0.5")[0].encoder.state_dict()["convs.6.weight"]
    assert not torch.equal(load_model(folder)[0].encoder.state_dict()["convs.6.weight"], by_l1)


def test_rewinding_takes_the_channels_of_an_earlier_checkpoint(capsys, dense):
    entries, _ = prune(capsys, dense, "prune.rate=0.5", "prune.rewind=step 4", "prune.finetune.iterations=1",
                       "prune.finetune.lr=1e-12")  # fmt: skip
    folder = dense / entries[0]["folder"]
    first = checkpoint.load_checkpoint(dense / "checkpoints/step-4").tensors["model"]["encoder.convs.0.weight"]
    rewound = checkpoint.load_newest(folder / "checkpoints")[0].tensors["model"]["encoder.convs.0.weight"]
    assert len(rewound) == 16
    assert all(any(torch.allclose(own, other, atol=1e-6) for other in first) for own in rewound)


def test_pruned_weights_stay_pruned_in_the_smaller_model(capsys, dense):
    code, _, err = run(capsys, "prune", dense, "prune.rate=0.6", "probe.kind=[knn]")
    assert code == 0, err
    sparse = dense / "pruned/l1-global-0.6"
    entries, _ = prune(capsys, sparse, "prune.rate=0.5", "prune.finetune.iterations=2")
    model, found = load_model(sparse / entries[-1]["folder"])
    assert widths_of(sparse / entries[-1]["folder"]) == WIDTHS
    assert "masks" in found.tensors
    zeros = sum(int((w == 0).sum()) for w in model.encoder.parameters() if w.ndim > 1)
    assert zeros == entries[-1]["prune"]["zeros"] > 0
    # and weights of a smaller model can be pruned
    code, _, err = run(capsys, "prune", sparse / entries[-1]["folder"], "prune.method=l1", "prune.scope=global",
                       "prune.rate=0.9", "probe.kind=[knn]")  # fmt: skip
    assert code == 0, err


def test_a_narrower_architecture_trains_from_scratch(capsys, tmp_path):
    widths = "model.channels={convs.0: [4, 1], convs.1: [4], convs.3: [64, 4]}"
    code, _, err = run(
        capsys, "pretrain", "default", *FAST, widths, "train.iterations=1", f"run_dir={tmp_path / 'r'}"
    )
    assert code == 0, err
    assert load_model(tmp_path / "r")[0].encoder.convs[0].weight.shape == (4, 1, 3, 3)
    widths = "model.channels={convs.0: [99, 1]}"
    code, _, err = run(capsys, "pretrain", "default", *FAST, widths, f"run_dir={tmp_path / 'q'}")
    assert code == 2
    assert "model.channels: convs.0: [99, 1] does not fit the layer's [32, 1]" in err
