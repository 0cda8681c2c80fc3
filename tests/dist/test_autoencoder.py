"""Evaluation of an autoencoder: errors over all images, the same on any number of ranks, and plots."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from hpc_supcon.cli import main
from hpc_supcon.config import load_config
from hpc_supcon.data import EvalTransform, load_splits
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.evaluation.reconstruction import interpolate, reconstruct, to_pixels
from hpc_supcon.stages.reconstruct import evaluate_autoencoder
from hpc_supcon.training.data import load_data
from tests.dist.ranks import run_ranks

SETTINGS = [
    "report.embeddings=false",
    "data.views=1", "augment.policy=none", "model.encoder=conv", "model.out_dim=16", "loss.name=reconstruction",
    "train.epochs=1", "log.tensorboard=false", "log.progress=false", "runtime.threads=1", "probe.kind=knn",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder") / "run"
    with pytest.raises(SystemExit) as done:
        main(["run", "default", *SETTINGS, f"run_dir={folder}"])
    assert not done.value.code
    return folder


def evaluate_again(rank, world_size, folder):
    config = load_config("default", [*SETTINGS, f"run_dir={folder}"])
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    return evaluate_autoencoder(folder, config, runtime, load_data(config, runtime))


def results(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def test_errors_equal_a_plain_mean_over_all_images(trained):
    model, found = load_model(trained)
    transform = EvalTransform(**found.state["normalization"])
    splits = load_splits("digits")
    entry = next(r for r in results(trained) if r["stage"] == "reconstruction")
    for name in ("validation", "test"):
        images = getattr(splits, name).stack()
        with torch.no_grad():
            error = reconstruct(model.eval(), transform(images)) - (images / 255 * 2 - 1)
        want = {"mae": float(error.abs().mean()), "mse": float(error.square().mean())}
        assert entry[name] == pytest.approx(want, rel=1e-5)
    assert {r["stage"] for r in results(trained)} == {"reconstruction", "probe"}


def test_ranks_agree_with_one_process(trained):
    alone = next(r for r in results(trained) if r["stage"] == "reconstruction")
    for result in run_ranks(evaluate_again, 3, trained):
        for split in ("validation", "test"):
            assert result[split] == pytest.approx(alone[split], rel=1e-6)


def test_an_interpolation_starts_and_ends_at_the_reconstructions(trained):
    model, found = load_model(trained)
    transform = EvalTransform(**found.state["normalization"])
    x = transform(load_splits("digits").test.stack()[:2])
    torch.testing.assert_close(to_pixels(x, transform), load_splits("digits").test.stack()[:2] / 255 * 2 - 1)
    with torch.no_grad():
        path, ends = interpolate(model.eval(), x[0], x[1], 10), reconstruct(model, x)
    assert len(path) == 10
    torch.testing.assert_close(path[[0, -1]], ends)
    steps = (path[1:] - path[:-1]).abs().mean(dim=(1, 2, 3))
    assert steps.min() > 0
    assert steps.max() < (path[-1] - path[0]).abs().mean()


@pytest.mark.parametrize("name", ["reconstructions", "interpolation", "loss-pretrain"])
def test_plots_are_drawn(trained, name):
    with Image.open(trained / "plots" / f"{name}.png") as plot:
        assert min(plot.size) > 200
        assert len(plot.convert("L").getcolors(1 << 20)) > 20, "an empty plot"
