"""Errors of probes on corrupted test images: equal on any number of ranks, and those of the saved probes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from hpc_supcon import run_folder as run_folders
from hpc_supcon.config import load_config
from hpc_supcon.data import EvalTransform, corrupt, stratified_sample
from hpc_supcon.data.corruptions import BENCHMARK, SEVERITIES
from hpc_supcon.distributed.launch import Launch, Runtime
from hpc_supcon.evaluation.encoder import load_model
from hpc_supcon.evaluation.fitted_probe import load_probe
from hpc_supcon.evaluation.robustness import ALEXNET
from hpc_supcon.stages.pretrain import pretrain
from hpc_supcon.stages.probe import probe
from hpc_supcon.training.data import load_data
from tests.dist.ranks import run_ranks

NAMES = ("shot_noise", "glass_blur", "fog")
KINDS = ("linear", "softmax", "logistic", "knn", "finetune")
SETTINGS = [
    "data.source=synthetic", "data.synthetic={images: 640, classes: 4, channels: 3, image_size: 8}", "run_dir=unused",
    "data.batch_size=16", "model.encoder=conv", "model.projection_hidden=16", "model.projection_dim=8",
    "train.iterations=4", "log.tensorboard=false", "log.progress=false", "runtime.threads=1",
    f"probe.kind=[{', '.join(KINDS)}]", "probe.linear={epochs: 2, lrs: [1e-2]}", "probe.softmax.iterations=20",
    "probe.logistic.iterations=20", "probe.logistic.classes=[3, 1]", "probe.finetune={epochs: 1, batch_size: 16}",
    f"probe.corruptions=[{', '.join(NAMES)}]",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with an encoder."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = load_config("default", [*SETTINGS, f"run_dir={folder}"])
    runtime = Runtime(Launch(), torch.device("cpu"))
    pretrain(config, runtime, load_data(config, runtime))
    return folder


def probed(rank, world_size, folder, overrides=()):
    """(summaries by probe, section `corruptions` of scores.json) of these ranks."""
    config = load_config("default", [*SETTINGS, f"run_dir={folder}", *overrides])
    runtime = Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))
    results = probe(folder, config, runtime, load_data(config, runtime))
    if world_size > 1:
        torch.distributed.barrier()
    return {r["probe"]: r.get("corruptions") for r in results}, run_folders.read_scores(folder)["corruptions"]


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """(run folder, what `probed` returned) of one rank, whose probes were also saved."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("alone") / "run")
    return folder, probed(0, 1, folder)


def test_errors_are_those_of_the_saved_probes_on_the_corrupted_images(alone):
    folder, (summaries, scores) = alone
    config = load_config("default", SETTINGS)
    splits = load_data(config, Runtime(Launch(), torch.device("cpu"))).splits
    model, found = load_model(folder)
    transform, encoder = EvalTransform(**found.state["normalization"]), model.encoder.eval()
    images, labels = splits.test.stack(), splits.test.labels
    clean = {r["probe"]: r["test"] for r in json.loads((folder / "results.json").read_text())["results"]}
    assert list(scores) == list(KINDS)
    for kind in KINDS:
        fitted = load_probe(folder / "probes" / kind)
        position = {splits.classes.index(name): k for k, name in enumerate(fitted.classes)}
        rows = torch.tensor([i for i, label in enumerate(labels.tolist()) if label in position])
        targets = torch.tensor([position[label] for label in labels[rows].tolist()])
        errors = {}
        for name in NAMES:
            errors[name] = []
            for severity in SEVERITIES:
                x = corrupt(images[rows], name, severity, rows)
                with torch.no_grad():
                    logits = fitted.logits(encoder(transform(x)) if fitted.input == "features" else x)
                errors[name].append((logits.argmax(dim=1) != targets).double().mean().item())
        assert scores[kind]["errors"] == {name: pytest.approx(values) for name, values in errors.items()}
        assert scores[kind]["clean"] == pytest.approx(1 - clean[kind]["accuracy"])
        assert scores[kind]["images"] == len(rows)
        every = [error for values in errors.values() for error in values]
        assert scores[kind]["mce"] == summaries[kind]["mce"] == pytest.approx(sum(every) / 15)
        means = {name: sum(values) / 5 for name, values in errors.items()}
        assert summaries[kind]["worst_error"] == pytest.approx(max(means.values()))
        assert means[summaries[kind]["worst"]] == max(means.values())
    assert len({scores[kind]["mce"] for kind in KINDS}) > 2


def test_errors_are_equal_on_one_and_on_three_ranks(trained, tmp_path):
    """Of probes that are fitted alike on any number of ranks; the images do not share equally among three."""
    only = ["probe.kind=[softmax, knn]", "probe.corruption_images=101"]
    expected = probed(0, 1, shutil.copytree(trained, tmp_path / "one"), only)
    assert expected[1]["knn"]["images"] == 101
    got = run_ranks(probed, 3, shutil.copytree(trained, tmp_path / "several"), only)
    assert all(result == expected for result in got)


def test_a_chosen_image_is_corrupted_as_it_is_among_all(trained, alone, tmp_path):
    """101 images of each kind of noise: not other ones, and not by the noise of their position in the choice."""
    _, scores = probed(
        0, 1, shutil.copytree(trained, tmp_path / "r"), ["probe.kind=knn", "probe.corruption_images=101"]
    )
    config = load_config("default", SETTINGS)
    splits = load_data(config, Runtime(Launch(), torch.device("cpu"))).splits
    images = splits.test.stack()
    chosen = stratified_sample(splits.test.labels, count=101, seed=0)
    model, found = load_model(alone[0])
    fitted = load_probe(alone[0] / "probes" / "knn")
    transform, encoder = EvalTransform(**found.state["normalization"]), model.encoder.eval()
    for name in NAMES:
        x = corrupt(images, name, 5, torch.arange(len(images)))[chosen]
        with torch.no_grad():
            predictions = fitted.logits(encoder(transform(x))).argmax(dim=1)
        error = (predictions != splits.test.labels[chosen]).double().mean().item()
        assert scores["knn"]["errors"][name][4] == pytest.approx(error)


def test_a_probe_without_images_of_its_classes_has_no_errors(trained, tmp_path, capsys):
    splits = load_data(load_config("default", SETTINGS), Runtime(Launch(), torch.device("cpu"))).splits
    only = int(splits.test.labels[stratified_sample(splits.test.labels, count=1, seed=0)])
    others = [label for label in range(4) if label != only]
    settings = ["probe.kind=[logistic, knn]", "probe.corruption_images=1", f"probe.logistic.classes={others[:2]}"]
    summaries, scores = probed(0, 1, shutil.copytree(trained, tmp_path / "r"), settings)
    assert list(scores) == ["knn"]
    assert summaries["logistic"] is None
    assert "probe.logistic: none of the 1 images that are corrupted is of its classes" in capsys.readouterr().err


def test_alexnets_errors_are_of_the_same_corruptions():
    assert set(ALEXNET) == set(BENCHMARK)
