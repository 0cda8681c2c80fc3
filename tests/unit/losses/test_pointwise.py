"""Triplet, cross-entropy, cross-entropy + MAE and reconstruction losses against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from hpc_supcon import losses
from hpc_supcon.errors import ConfigError, LossInputError
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


def test_random_sampling_reaches_every_positive_and_negative_equally_and_nothing_else():
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


def test_semihard_negatives_lie_beyond_the_positive_as_near_as_possible():
    x = torch.randn(12, 4, dtype=torch.float64)
    positive, _, valid = triplet._sample(LABELS, 0, 12, torch.Generator().manual_seed(1))
    chosen, negative = triplet._mine("semihard", x, x, LABELS, LABELS, 0, positive)
    assert torch.equal(chosen, positive)
    for a in valid.nonzero().flatten().tolist():
        reach = _distance(x[a], x[positive[a]], False)
        options = [(_distance(x[a], x[j], False), j) for j in range(12) if LABELS[j] != LABELS[a]]
        beyond = [o for o in options if o[0] > reach]
        assert int(negative[a]) == (min(beyond) if beyond else max(options))[1]


def test_duplicate_rows_never_pair_an_anchor_with_itself():
    x = torch.zeros(6, 3)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    positive, _ = triplet._mine("hard", x, x, labels, labels, 0, torch.zeros(6, dtype=torch.int64))
    assert (positive != torch.arange(6)).all()
    assert (labels[positive] == labels).all()


@pytest.mark.parametrize("mining", ["random", "semihard", "hard"])
def test_no_triplet_gives_a_differentiable_zero(mining):
    for labels in (torch.arange(5), torch.zeros(5, dtype=torch.int64)):
        x = torch.randn(5, 3, requires_grad=True)
        loss = losses.TripletLoss(mining=mining)(x, labels)
        loss.backward()
        assert float(loss.detach()) == 0
        assert torch.equal(x.grad, torch.zeros(5, 3))
    x = torch.randn(0, 3, requires_grad=True)
    losses.TripletLoss(mining=mining)(x, torch.zeros(0, dtype=torch.int64)).backward()


def test_distance_of_equal_rows_has_a_finite_gradient():
    x = torch.ones(4, 3, requires_grad=True)
    losses.TripletLoss(squared=False)(x, torch.tensor([0, 0, 1, 1])).backward()
    assert torch.isfinite(x.grad).all()


def test_triplet_gradient_is_that_of_the_definition():
    x = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    for mining in ("random", "semihard", "hard"):
        module = losses.TripletLoss(2.0, mining=mining)
        generator = torch.Generator().manual_seed(4)

        def f(x, module=module, generator=generator):
            generator.manual_seed(4)
            return module(x, LABELS, generator=generator)

        assert torch.autograd.gradcheck(f, (x,))


def test_cross_entropy_and_its_sum_with_the_mean_absolute_error():
    logits, labels = torch.randn(7, 5, dtype=torch.float64), torch.randint(0, 5, (7,))
    entropy = error = 0.0
    for row, label in zip(logits, labels, strict=True):
        p = [math.exp(float(v)) for v in row]
        p = [v / sum(p) for v in p]
        entropy -= math.log(p[label]) / 7
        error += sum(abs(v - (j == int(label))) for j, v in enumerate(p)) / (7 * 5)
    assert float(losses.CrossEntropyLoss()(logits, labels)) == pytest.approx(entropy, rel=1e-12)
    assert float(losses.CrossEntropyMAELoss()(logits, labels)) == pytest.approx(entropy + error, rel=1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = losses.CrossEntropyMAELoss()(logits.bfloat16(), labels.int())
    assert half.dtype == torch.float32


def test_reconstruction_is_a_weighted_sum_of_squared_and_absolute_error():
    a, b = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        expected = alpha * ((a - b) ** 2).mean() + (1 - alpha) * (a - b).abs().mean()
        assert float(losses.ReconstructionLoss(alpha)(a, b)) == pytest.approx(float(expected), rel=1e-6)
    assert losses.ReconstructionLoss()(a.half(), b).dtype == torch.float32
    assert float(losses.ReconstructionLoss(1.0)(a, b)) == pytest.approx(float(F.mse_loss(a, b)))


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: losses.TripletLoss(mining="hardest"), "did you mean 'hard'"),
        (lambda: losses.TripletLoss(margin=-1.0), "margin"),
        (lambda: losses.ReconstructionLoss(1.5), "alpha"),
    ],
)
def test_impossible_settings_are_named_errors(make, fragment):
    with pytest.raises(ConfigError, match=fragment):
        make()


def test_impossible_input_is_a_named_error():
    for bad in (torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)):
        for loss in (losses.CrossEntropyLoss(), losses.CrossEntropyMAELoss()):
            with pytest.raises(LossInputError, match="labels"):
                loss(torch.randn(3, 4), bad)
    with pytest.raises(LossInputError, match="differ in shape"):
        losses.ReconstructionLoss()(torch.zeros(2, 3), torch.zeros(2, 4))
