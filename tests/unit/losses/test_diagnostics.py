"""Mean similarity and gradient response against their definitions, and the theorems of the TCL paper."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon import losses
from tests import brute_force
from tests.unit.losses.test_contrastive import K1, K2, batch


def test_mean_similarity_is_the_mean_cosine_of_all_pairs_of_different_rows():
    x = torch.randn(5, 3, 7, dtype=torch.float64) * torch.rand(5, 3, 1, dtype=torch.float64)
    rows = x.flatten(0, 1)
    pairs = [torch.cosine_similarity(rows[i], rows[j], dim=0) for i in range(15) for j in range(15) if i != j]
    assert float(losses.mean_similarity(x)) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-12)
    assert float(losses.mean_similarity(torch.ones(4, 2, 7) * torch.rand(4, 2, 1))) == pytest.approx(1, abs=1e-6)
    assert float(losses.mean_similarity(torch.ones(1, 7))) == pytest.approx(0, abs=1e-12)


def test_gradient_responses_are_lemmas_one_and_two_of_tcl():
    x, labels = batch("singletons among classes")
    for k1, k2 in ((0.0, 1.0), (K1, K2)):
        expected = brute_force.responses(x, labels, 0.1, k1, k2)
        got = losses.gradient_response(x, labels, 0.1, k1, k2, tile_size=4)
        positives = sum(abs(pull) for pulls, _ in expected for pull in pulls) / len(expected)
        negatives = sum(push for _, pushes in expected for push in pushes) / len(expected)
        assert float(got.positives) == pytest.approx(positives, rel=1e-10)
        assert float(got.negatives) == pytest.approx(negatives, rel=1e-10)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_theorem_1_hard_positives_respond_more_to_tcl_than_to_supcon(tau):
    """A positive is hard where it still has to come closer: X_ip > P_ip."""
    x, labels = torch.randn(24, 8, dtype=torch.float64), torch.arange(24) % 6
    supcon = brute_force.responses(x, labels, tau, 0.0, 1.0)
    hard = sum(pull > 0 for pulls, _ in supcon for pull in pulls)
    assert hard > 40
    for k1, k2 in ((1.0, 1.0), (100.0, 1.0), (5000.0, 1.0), (1.0, 3.0), (50.0, 2.0)):
        tuned = brute_force.responses(x, labels, tau, k1, k2)
        for (before, _), (after, _) in zip(supcon, tuned, strict=True):
            assert all(b > a for a, b in zip(before, after, strict=True) if a > 0)
        if hard == sum(len(pulls) for pulls, _ in supcon):
            plain, tcl = (losses.gradient_response(x, labels, tau, *k) for k in ((0.0, 1.0), (k1, k2)))
            assert float(tcl.positives) > float(plain.positives)
        else:
            assert tau == 0.1, "at temperature 1 every positive of this batch is hard"


def test_theorem_2_the_response_of_negatives_grows_strictly_with_k2():
    x, labels = batch("singletons among classes")
    for k1 in (0.0, 1.0, 5000.0):
        responses = [
            float(losses.gradient_response(x, labels, 0.1, k1, k2).negatives) for k2 in (1.0, 1.2, 1.5, 3, 9)
        ]
        assert responses == sorted(set(responses))
