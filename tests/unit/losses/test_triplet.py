"""The triplet loss against its definition, and how triplets are chosen."""

from __future__ import annotations

import math

import pytest
import torch

from hpc_supcon import losses
from hpc_supcon.errors import ConfigError
from hpc_supcon.losses import triplet


def _distance(a, b, squared):
    d = float((a - b).pow(2).sum())
    return d if squared else math.sqrt(d)


def _all_triplets(x, labels, margin, squared):
    """anchor -> list of (positive, negative, loss) written pair by pair."""
    n = len(x)
    found = {}
    for a in range(n):
        for p in range(n):
            for q in range(n):
                if p != a and labels[p] == labels[a] and labels[q] != labels[a]:
                    value = max(_distance(x[a], x[p], squared) - _distance(x[a], x[q], squared) + margin, 0.0)
                    found.setdefault(a, []).append((p, q, value))
    return found


LABELS = torch.tensor([3, 0, 0, 3, 3, 1, 2, 2, 0, 3, 7, 2])


@pytest.mark.parametrize("squared", [True, False])
def test_hard_triplets_are_the_farthest_positive_and_the_nearest_negative(squared):
    x = torch.randn(12, 4, dtype=torch.float64)
    worst = [max(v for _, _, v in options) for options in _all_triplets(x, LABELS, 0.5, squared).values()]
    loss = losses.TripletLoss(0.5, mining="hard", squared=squared)(x, LABELS)
    assert float(loss) == pytest.approx(sum(worst) / len(worst), rel=1e-12)


def test_random_triplets_average_to_the_mean_over_all_triplets():
    x = torch.randn(12, 4, dtype=torch.float64)
    means = [sum(v for _, _, v in options) / len(options) for options in _all_triplets(x, LABELS, 1.0, True).values()]
    generator = torch.Generator().manual_seed(0)
    loss = losses.TripletLoss(1.0)
    draws = torch.stack([loss(x, LABELS, generator=generator) for _ in range(3000)])
    error = float(draws.std()) / math.sqrt(len(draws))
    assert abs(float(draws.mean()) - sum(means) / len(means)) < 5 * error
    assert float(loss.stats["anchors_without_triplet"]) == 2


def test_random_sampling_is_uniform_over_the_positives_and_over_the_negatives():
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(12, 12), torch.zeros(12, 12)
    for _ in range(4000):
        positive, negative, valid = triplet._sample(LABELS, 0, 12, generator)
        rows = valid.nonzero().flatten()
        seen[0][rows, positive[rows]] += 1
        seen[1][rows, negative[rows]] += 1
    for a in range(12):
        positives = [j for j in range(12) if j != a and LABELS[j] == LABELS[a]]
        negatives = [j for j in range(12) if LABELS[j] != LABELS[a]]
        for counts, members in ((seen[0][a], positives), (seen[1][a], negatives)):
            expected = 4000 / len(members) if positives and members else 0
            for j in range(12):
                want = expected if j in members else 0
                assert abs(float(counts[j]) - want) <= 6 * math.sqrt(max(want, 0))


def test_semihard_negatives_are_the_nearest_ones_farther_than_the_positive():
    x = torch.randn(12, 4, dtype=torch.float64)
    positive, _, valid = triplet._sample(LABELS, 0, 12, torch.Generator().manual_seed(1))
    chosen, negative = triplet._mine("semihard", x, x, LABELS, LABELS, 0, positive)
    assert torch.equal(chosen, positive)
    for a in valid.nonzero().flatten().tolist():
        to_positive = _distance(x[a], x[positive[a]], False)
        options = [(_distance(x[a], x[j], False), j) for j in range(12) if LABELS[j] != LABELS[a]]
        farther = [o for o in options if o[0] > to_positive]
        assert int(negative[a]) == (min(farther) if farther else max(options))[1]


def test_duplicate_rows_never_pair_an_anchor_with_itself():
    x = torch.zeros(6, 3)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    positive, _ = triplet._mine("hard", x, x, labels, labels, 0, torch.zeros(6, dtype=torch.int64))
    assert (positive != torch.arange(6)).all()
    assert (labels[positive] == labels).all()


@pytest.mark.parametrize("mining", ["random", "semihard", "hard"])
def test_without_any_triplet_the_loss_is_a_differentiable_zero(mining):
    for labels in (torch.arange(5), torch.zeros(5, dtype=torch.int64)):
        x = torch.randn(5, 3, requires_grad=True)
        loss = losses.TripletLoss(mining=mining)(x, labels)
        loss.backward()
        assert float(loss.detach()) == 0
        assert torch.equal(x.grad, torch.zeros(5, 3))
    x = torch.randn(0, 3, requires_grad=True)
    losses.TripletLoss(mining=mining)(x, torch.zeros(0, dtype=torch.int64)).backward()


def test_the_distance_of_equal_rows_has_a_finite_gradient():
    x = torch.ones(4, 3, requires_grad=True)
    losses.TripletLoss(squared=False)(x, torch.tensor([0, 0, 1, 1])).backward()
    assert torch.isfinite(x.grad).all()


def test_the_triplet_gradient_is_the_numerical_one():
    x = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    for mining in ("random", "semihard", "hard"):
        module = losses.TripletLoss(2.0, mining=mining)
        generator = torch.Generator().manual_seed(4)

        def f(x, module=module, generator=generator):
            generator.manual_seed(4)
            return module(x, LABELS, generator=generator)

        assert torch.autograd.gradcheck(f, (x,))


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: losses.TripletLoss(mining="hardest"), "did you mean 'hard'"),
        (lambda: losses.TripletLoss(margin=-1.0), "margin"),
    ],
)
def test_invalid_settings_are_refused(make, fragment):
    with pytest.raises(ConfigError, match=fragment):
        make()
