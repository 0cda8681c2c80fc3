"""Detection of images of another data set: detectors and scores against references, on any number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import roc_auc_score, roc_curve

from hpc_supcon.errors import CorruptSample, NonFinite
from hpc_supcon.evaluation.ood import knn_detector, mahalanobis_detector, max_softmax_scores, ood_scores
from tests.dist.ranks import run_ranks


def lowest_rate(own, other):
    """The smallest share of the other set that any threshold accepts which accepts 95 % of the run's own images."""
    rates = [
        (np.mean([o <= t for o in other]), np.mean([o <= t for o in own]))
        for t in {*own, *other, -math.inf, math.inf}
    ]
    return min(wrong for wrong, right in rates if right >= 0.95)


@pytest.mark.parametrize("levels", [2, 5, 10**6])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (19, 4), (20, 33), (101, 40)])
def test_scores_equal_scikit_learn_and_brute_force_with_ties(n, m, levels):
    own, other = (torch.rand(n) * levels).floor(), (torch.rand(m) * levels * 1.3).floor()
    got = ood_scores(own, other)
    truth, numbers = np.repeat([0, 1], [n, m]), torch.cat([own, other]).numpy()
    assert got["auroc"] == pytest.approx(roc_auc_score(truth, numbers), abs=1e-12)
    assert got["fpr95"] == pytest.approx(lowest_rate(own.tolist(), other.tolist()), abs=1e-12)
    fpr, tpr, _ = roc_curve(1 - truth, -numbers, drop_intermediate=False)
    assert got["fpr95"] == pytest.approx(fpr[tpr >= 0.95 - 1e-12].min(), abs=1e-12)


def test_a_detector_that_sees_no_difference_is_at_chance():
    assert ood_scores(torch.zeros(30), torch.zeros(7)) == {"auroc": 0.5, "fpr95": 1.0}
    assert ood_scores(torch.zeros(30), torch.ones(7)) == {"auroc": 1.0, "fpr95": 0.0}


def test_a_number_that_is_not_finite_is_a_named_error():
    with pytest.raises(NonFinite, match=r"probe\.ood"):
        ood_scores(torch.zeros(3), torch.tensor([0.0, math.nan]))


def test_knn_is_the_distance_to_the_kth_nearest_training_row():
    train, x = torch.randn(50, 6), torch.randn(8, 6) * 5
    unit, queries = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (train, x))
    want = torch.cdist(queries, unit).sort(dim=1).values[:, 6]
    torch.testing.assert_close(knn_detector(train, 7)(x), want, atol=1e-6, rtol=1e-5)
    with pytest.raises(CorruptSample, match=r"probe\.knn\.k=51 neighbors for probe\.ood, but training has 50"):
        knn_detector(train, 51)


@pytest.mark.parametrize("width", [4, 30])
def test_mahalanobis_is_that_of_class_means_and_the_covariance_of_ledoit_and_wolf(width):
    """With 30 features and 25 rows the covariance alone is singular; one feature never varies."""
    train, labels, x = torch.randn(25, width), torch.tensor([0, 2, 2, 3, 0] * 5), torch.randn(9, width)
    train[:, 1] = 3
    rows, points = train.double().numpy(), x.double().numpy()
    means = {c: rows[labels == c].mean(axis=0) for c in (0, 2, 3)}
    covariance, shrinkage = ledoit_wolf(rows - np.stack([means[int(c)] for c in labels]), assume_centered=True)
    assert 0.01 < shrinkage < 1
    inverse = np.linalg.inv(covariance)
    want = [min((p - m) @ inverse @ (p - m) for m in means.values()) for p in points]
    got = mahalanobis_detector((train, labels), classes=5)(x)
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("rows", [torch.ones(6, 3), torch.eye(3).repeat(2, 1), torch.randn(1, 3).expand(6, 3)])
def test_rows_that_do_not_vary_within_their_class_give_finite_distances(rows):
    found = mahalanobis_detector((rows, torch.tensor([0, 1, 2] * 2)), classes=3)(torch.cat([rows, rows + 1]))
    assert found.isfinite().all()
    assert (found[:6] < 1e-9).all()
    assert (found[6:] > 0.1).all()


def test_max_softmax_orders_images_whose_probabilities_round_to_one():
    logits = torch.tensor([[60.0, 0, 0], [50, 0, 0], [1, 0, 0], [0, 0, 0]])
    found = max_softmax_scores(logits)
    assert found.tolist() == sorted(set(found.tolist()))
    torch.testing.assert_close(found[2:].neg().sigmoid(), logits[2:].double().softmax(1).amax(1))


def detected(rank, world_size, train, labels, own, other, bounds):
    """Every detector's scores of the rows between this rank's bounds, which the tensors are cut at alike."""

    def share(rows):
        return rows[len(rows) * bounds[rank] // 10 : len(rows) * bounds[rank + 1] // 10]

    detectors = {"knn": knn_detector(share(train), 5), "far": mahalanobis_detector((share(train), share(labels)), 4)}
    return {name: ood_scores(detect(share(own)), detect(share(other))) for name, detect in detectors.items()}


def test_scores_are_equal_on_1_2_and_3_ranks_of_which_some_have_no_row():
    labels = torch.arange(400) // 100
    train = torch.randn(400, 6) + 2 * torch.eye(6)[labels]
    own, other = torch.randn(201, 6) + 2 * torch.eye(6)[torch.arange(201) % 4], torch.randn(53, 6) * 1.3
    arguments = (train, labels, own, other)
    want = detected(0, 1, *arguments, [0, 10])
    assert all(0.5 < scores["auroc"] < 1 and 0 < scores["fpr95"] < 1 for scores in want.values())
    for bounds in ([0, 0, 10], [0, 7, 7, 10]):
        assert run_ranks(detected, len(bounds) - 1, *arguments, bounds) == [want] * (len(bounds) - 1)
