"""Scores of one split against scikit-learn, brute force and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    top_k_accuracy_score,
)

from hpc_supcon.errors import DataError, NonFinite
from hpc_supcon.evaluation.scores import (
    bootstrap_intervals,
    calibration_error,
    count_confusion,
    gather_outcomes,
    headline_entry,
    split_scores,
)


def scores_of(logits, labels, classes=None):
    names = [f"class {k}" for k in range(classes or logits.shape[1])]
    return split_scores(gather_outcomes(logits, labels, "a probe"), names, seed=0)


def logits_of(predictions, classes):
    """Logits whose largest is that of the prediction, with different distances."""
    noise = torch.rand(len(predictions), classes, generator=torch.Generator().manual_seed(3))
    return noise.scatter_add(1, predictions[:, None], 1 + noise[:, :1])


def brute_force_calibration(confidence, correct):
    """The definition, bin by bin and sample by sample."""
    total = 0.0
    for m in range(15):
        inside = [i for i, c in enumerate(confidence) if m / 15 < c <= (m + 1) / 15]
        if inside:
            accuracy = sum(bool(correct[i]) for i in inside) / len(inside)
            mean = math.fsum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return total


def cases():
    generator = torch.Generator().manual_seed(0)

    def random(high, n):
        return torch.randint(high, (n,), generator=generator)

    labels = random(8, 300)
    noisy = torch.where(torch.rand(300, generator=generator) < 0.6, labels, random(8, 300))
    yield "random", noisy, labels, 8
    yield "class 4 is predicted but not there, class 5 neither", random(5, 40), random(4, 40), 6
    yield "classes 1 and 2 are never predicted", torch.zeros(50, dtype=torch.int64), random(3, 50), 3
    yield "one class only, always right", torch.full((9,), 2), torch.full((9,), 2), 4
    yield "one class only, always wrong", torch.full((9,), 1), torch.full((9,), 2), 4
    yield "one sample, right", torch.tensor([1]), torch.tensor([1]), 2
    yield "one sample, wrong", torch.tensor([6]), torch.tensor([0]), 7
    yield "five classes", random(5, 30), random(5, 30), 5


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("case", [pytest.param(case[1:], id=case[0]) for case in cases()])
def test_scores_equal_scikit_learn(case):
    predictions, labels, classes = case
    logits = logits_of(predictions, classes)
    got = scores_of(logits, labels)
    everything, present = range(classes), labels.unique().tolist()
    probabilities = logits.double().softmax(dim=1)
    want = {
        "samples": len(labels),
        "accuracy": accuracy_score(labels, predictions),
        "balanced_accuracy": recall_score(labels, predictions, labels=present, average="macro", zero_division=0),
        "nll": log_loss(labels, probabilities, labels=everything),
        "ece": brute_force_calibration(probabilities.amax(dim=1).tolist(), predictions == labels),
    }
    if len(present) > 1:  # scikit-learn warns of one class
        assert got["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predictions), rel=1e-14)
    if classes > 5:
        want["top5"] = top_k_accuracy_score(labels, logits, k=5, labels=everything)
    for name, score in {"f1": f1_score, "precision": precision_score, "recall": recall_score}.items():
        want[name] = score(labels, predictions, labels=present, average="macro", zero_division=0)
        want[f"{name}_weighted"] = score(labels, predictions, labels=present, average="weighted", zero_division=0)
        by_class = score(labels, predictions, labels=everything, average=None, zero_division=0)
        assert got["per_class"][name] == pytest.approx(by_class.tolist(), rel=1e-14)
    assert got["per_class"]["samples"] == torch.bincount(labels, minlength=classes).tolist()
    assert got["confusion"] == confusion_matrix(labels, predictions, labels=everything).tolist()
    left = {"per_class", "confusion", "accuracy_interval", "f1_interval"}
    assert {name: got[name] for name in got.keys() - left} == pytest.approx(want, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("classes", [2, 3, 7, 10, 49])
def test_no_score_of_perfect_predictions_differs_from_one(classes):
    labels = torch.arange(3000) % classes
    scores = scores_of(1000.0 * torch.eye(classes)[labels], labels)
    zero = {"ece", "nll"}
    for name, value in scores.items():
        if name not in {"samples", "per_class", "confusion"}:
            assert value == (0 if name in zero else [1, 1] if "interval" in name else 1), name
    assert headline_entry(scores, [""] * classes) == dict.fromkeys(("accuracy", "f1", "precision", "recall"), 1.0)


def test_results_name_the_classes_that_a_split_lacks():
    scores = scores_of(torch.eye(4)[[0, 3, 1]], torch.tensor([0, 0, 1]))
    entry = headline_entry(scores, ["a", "b", "c", "d"])
    assert entry.pop("absent") == ["c", "d"]
    assert entry == {name: scores[name] for name in ("accuracy", "f1", "precision", "recall")}
    assert entry["f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_ties_go_to_the_first_class_in_predictions_and_places():
    logits = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0], [3.0, 0.0, 3.0]])
    outcomes = gather_outcomes(logits, torch.tensor([2, 1, 2]), "a probe")
    assert outcomes.predictions.tolist() == [0, 1, 0]
    assert outcomes.places.tolist() == [2, 0, 1]
    random = torch.randint(4, (200, 9)).float()  # many ties
    labels = torch.randint(9, (200,))
    want = [sorted(range(9), key=lambda k: -row[k]).index(label) for row, label in zip(random, labels, strict=True)]
    assert gather_outcomes(random, labels, "a probe").places.tolist() == want
    assert scores_of(random, labels)["top5"] == sum(place < 5 for place in want) / 200


def test_probabilities_of_exactly_0_and_1_count_as_epsilon_as_in_scikit_learn():
    logits = torch.tensor([[0.0, 2000.0], [2000.0, 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 0, 1])
    probabilities = logits.double().softmax(dim=1)
    assert probabilities[:2].tolist() == [[0, 1], [1, 0]]
    scores = scores_of(logits, labels)
    assert scores["nll"] == pytest.approx(log_loss(labels, probabilities), rel=1e-12)
    assert scores["nll"] == pytest.approx((-math.log(np.finfo(np.float64).eps) + math.log(2)) / 3, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_rows_than_are_computed_at_once_give_the_same(dtype):
    logits, labels = torch.randn(20_001, 3, dtype=dtype), torch.randint(3, (20_001,))
    scores = scores_of(logits, labels)
    probabilities = logits.double().softmax(dim=1)
    assert scores["nll"] == pytest.approx(log_loss(labels, probabilities), rel=1e-12)
    right = logits.argmax(dim=1) == labels
    assert scores["ece"] == pytest.approx(
        brute_force_calibration(probabilities.amax(dim=1).tolist(), right), rel=1e-9
    )


def test_calibration_error_of_probabilities_on_the_edges_of_bins():
    edges = [m / 15 for m in range(1, 16)]
    values = np.array([*edges, *np.nextafter(edges, 0), *np.nextafter(edges[:-1], 1), 1e-9] * 3)
    correct = np.random.default_rng(1).random(len(values)) < 0.5
    assert calibration_error(values, correct) == pytest.approx(brute_force_calibration(values, correct), rel=1e-12)
    assert calibration_error(np.array([1 + 2e-16]), np.array([True])) < 1e-15


def test_a_calibrated_classifier_has_no_calibration_error_and_a_boastful_one_its_excess():
    right = np.arange(1000) % 10 < 7
    assert calibration_error(np.full(1000, 0.7), right) == pytest.approx(0, abs=1e-12)
    assert calibration_error(np.full(1000, 0.95), right) == pytest.approx(0.25)


def resampled_images(predictions, labels, resamples):
    """Accuracy and macro F1 (scikit-learn's) of resamples that are drawn image by image."""
    generator = np.random.default_rng(7)
    accuracies, f1s = [], []
    for _ in range(resamples):
        rows = generator.integers(len(labels), size=len(labels))
        y, p = labels[rows], predictions[rows]
        accuracies.append(accuracy_score(y, p))
        f1s.append(f1_score(y, p, labels=np.unique(y), average="macro", zero_division=0))
    return np.array(accuracies), np.array(f1s)


def test_intervals_are_those_of_resampled_images():
    """Class 3 has two images, so that some resamples lack it; class 4 has none but is predicted."""
    generator = np.random.default_rng(0)
    labels = np.array([0] * 30 + [1] * 40 + [2] * 8 + [3] * 2)
    predictions = np.where(generator.random(80) < 0.7, labels, generator.integers(5, size=80))
    got = bootstrap_intervals(count_confusion(predictions, labels, 5), seed=0)
    for interval, values in zip(got, resampled_images(predictions, labels, 1000), strict=True):
        # where in the brute-force distribution the ends lie: percentiles of 1000 draws spread by 0.5
        below, up_to = [[(op(values, end)).mean() * 100 for end in interval] for op in (np.less, np.less_equal)]
        assert below[0] - 1.5 < 2.5 < up_to[0] + 1.5
        assert below[1] - 1.5 < 97.5 < up_to[1] + 1.5
        assert interval[1] - interval[0] == pytest.approx(np.ptp(np.percentile(values, [2.5, 97.5])), rel=0.15)


def test_intervals_cover_the_true_accuracy_about_as_often_as_they_say():
    generator, covered = np.random.default_rng(5), 0
    for seed in range(200):
        labels = generator.integers(4, size=150)
        predictions = np.where(generator.random(150) < 0.8, labels, (labels + 1) % 4)
        (low, high), _ = bootstrap_intervals(count_confusion(predictions, labels, 4), seed=seed)
        covered += low <= 0.8 <= high
    assert 0.88 < covered / 200 <= 0.99  # 95 % with a spread of 1.5 %; the percentile method is a little short


def test_intervals_depend_on_the_seed_alone(monkeypatch):
    confusion = np.array([[20, 5, 0], [3, 30, 1], [0, 9, 12]])
    want = bootstrap_intervals(confusion, seed=3)
    assert bootstrap_intervals(confusion, seed=3) == want
    assert bootstrap_intervals(confusion, seed=4) != want
    for low, high in want:
        assert 0 < low < high < 1
    monkeypatch.setattr("hpc_supcon.evaluation.scores._CELLS", 70)  # ten resamples at once
    assert bootstrap_intervals(confusion, seed=3) == want


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_named(value):
    logits = torch.zeros(5, 3)
    logits[1, 2] = logits[4, 0] = logits[4, 1] = value
    with pytest.raises(NonFinite, match="mlp probe, test split: the logits of 2 images are NaN or Inf") as found:
        gather_outcomes(logits, torch.zeros(5, dtype=torch.int64), "mlp probe, test split")
    assert found.value.exit_code == 3


def test_no_sample_at_all_is_named():
    with pytest.raises(DataError, match="no image"):
        gather_outcomes(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), "a probe")
