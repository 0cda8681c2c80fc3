"""A learned temperature stays in the range of its dtype, and never at the edge of it for good."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon import losses
from hpc_supcon.losses.temperature import FP32_TEMPERATURE, MIN_TEMPERATURE, at_least
from tests import brute_force


def test_at_the_bound_only_a_gradient_that_leads_back_passes():
    for value, gradient, expected in [
        (0.01, 2.0, 0.0),  # a step against this gradient would lower the temperature further
        (0.01, -2.0, -2.0),
        (0.025, 2.0, 0.0),
        (0.025, -2.0, -2.0),
        (0.3, 2.0, 2.0),
        (0.3, -2.0, -2.0),
    ]:
        temperature = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        found = at_least(temperature, 0.025)
        found.backward(torch.tensor(gradient, dtype=torch.float64))
        assert (float(found.detach()), float(temperature.grad)) == (max(value, 0.025), expected)
    assert torch.isnan(at_least(torch.tensor(float("nan")), 0.025))


def train(module, x, labels, steps):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        module(x, labels).backward()
        optimizer.step()
    return float(module.temperature.detach())


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize(("start", "bound"), [(0.03, FP32_TEMPERATURE), (0.0022, MIN_TEMPERATURE)])
def test_training_lowers_the_temperature_to_its_bound_and_raises_it_again(start, bound, backend):
    # Classes of equal rows want a temperature of zero; with half of the labels exchanged, a high one.
    similarity = torch.tensor(1 - 1.7 * start, dtype=torch.float64)
    centers = torch.cat([similarity.sqrt().expand(4, 1), (1 - similarity).sqrt() * torch.eye(4)], dim=1)
    x, labels = centers.repeat_interleave(6, 0), torch.arange(4).repeat_interleave(6)
    module = losses.SupConLoss(start, backend=backend, learnable_temperature=True)
    assert train(module, x, labels, 40) == pytest.approx(bound, rel=1e-6)
    expected = brute_force.contrastive(x, labels, bound, "out")
    assert float(module(x, labels).detach()) == pytest.approx(float(expected), rel=1e-4, abs=1e-4)
    assert train(module, x, labels.roll(3), 3) > 1.2 * bound


def test_a_temperature_that_is_a_tensor_is_raised_to_the_bound_of_its_call():
    x, labels = torch.randn(14, 5), torch.arange(14) % 3
    for least, dtype in ((0.025, torch.float32), (0.01, torch.float64)):
        stats = losses.pairwise_stats(x, labels, torch.tensor(0.001), backend="tiled", least_temperature=least)
        expected = losses.pairwise_stats(x, labels, least, backend="tiled")
        assert stats.log_pos.dtype == dtype
        torch.testing.assert_close(stats.log_pos, expected.log_pos)
        torch.testing.assert_close(stats.log_neg, expected.log_neg)


def test_the_log_has_the_temperature_that_was_used():
    module = losses.SupConLoss(0.1, learnable_temperature=True)
    with torch.no_grad():
        module.log_temperature.fill_(-9.0)
    assert float(module.temperature.detach()) == pytest.approx(FP32_TEMPERATURE)
