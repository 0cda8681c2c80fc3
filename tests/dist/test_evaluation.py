"""Scores do not depend on how many ranks share the work."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from hpc_supcon.config import load_config
from hpc_supcon.data import EvalTransform
from hpc_supcon.evaluation.evaluate import load_model, probe
from hpc_supcon.evaluation.features import extract
from hpc_supcon.evaluation.scores import classification_scores
from hpc_supcon.runtime import Launch, Runtime
from hpc_supcon.training import assemble
from hpc_supcon.training.pretrain import pretrain
from tests.dist.ranks import run_ranks


def settings(folder):
    return load_config(
        "quickstart",
        ["train.epochs=1", "probe.epochs=3", "log.tensorboard=false", "log.progress=false", f"run_dir={folder}"],
    )


def here(rank, world_size):
    return Runtime(Launch(rank=rank, world_size=world_size), torch.device("cpu"))


def shared_features(rank, world_size, folder, n):
    config = settings(folder)
    source = assemble.load_data(config, here(rank, world_size)).splits.test.subset(list(range(n)))
    model, found = load_model(config.folder)
    features, labels = extract(
        model.encoder, source, EvalTransform(**found.state["normalisation"]), here(rank, world_size), batch_size=5
    )
    return features, labels, source.labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = settings(folder)
    pretrain(config, here(0, 1), assemble.load_data(config, here(0, 1)))
    return folder


def test_metrics_are_identical_on_1_2_and_3_ranks(trained):
    results = [run_ranks(evaluate_odd, world, trained) for world in (1, 2, 3)]
    want = {k: results[0][0][k] for k in ("chosen", "validation", "test")}
    assert 0.3 < want["test"]["accuracy"] < 1
    for ranks in results:
        for result in ranks:
            assert {k: result[k] for k in want} == want


def evaluate_odd(rank, world_size, folder):
    """353 test images and 143 for validation: divisible by neither 2 nor 3."""
    config = settings(folder)
    data = assemble.load_data(config, here(rank, world_size))
    splits = data.splits
    splits = type(splits)(splits.train, splits.validation, splits.test.subset(list(range(353))))
    assert all(len(s) % n for s in (splits.test, splits.validation) for n in (2, 3))
    return probe(config.folder, config, here(rank, world_size), dataclasses.replace(data, splits=splits))


@pytest.mark.parametrize("n", [2, 17])
def test_every_sample_is_encoded_exactly_once_with_the_same_bits(trained, n):
    whole, labels, want_labels = shared_features(0, 1, trained, n)
    assert torch.equal(labels, want_labels)
    parts = run_ranks(shared_features, 3, trained, n)
    assert torch.equal(torch.cat([p[1] for p in parts]), want_labels)
    assert torch.equal(torch.cat([p[0] for p in parts]), whole)


def score(rank, world_size, predictions, labels, bounds):
    own = slice(bounds[rank], bounds[rank + 1])
    return classification_scores(predictions[own], labels[own], 5)


@pytest.mark.parametrize("bounds", [[0, 3, 40], [0, 0, 40], [0, 40, 40]])
def test_scores_equal_scikit_learns_whatever_rank_holds_the_samples(bounds):
    predictions, labels = torch.randint(5, (40,)), torch.randint(4, (40,))  # class 4 never occurs, but is predicted
    averaged = {"average": "macro", "zero_division": 0}
    want = {
        "accuracy": accuracy_score(labels, predictions),
        "f1": f1_score(labels, predictions, **averaged),
        "precision": precision_score(labels, predictions, **averaged),
        "recall": recall_score(labels, predictions, **averaged),
    }
    for got in [score(0, 1, predictions, labels, [0, 40]), *run_ranks(score, 2, predictions, labels, bounds)]:
        assert got == pytest.approx(want, abs=1e-6)
