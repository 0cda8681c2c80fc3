"""The losses of single images against their definitions: cross-entropy, cross-entropy + MAE, reconstruction."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from hpc_supcon import losses
from hpc_supcon.errors import ConfigError, LossInputError


def test_cross_entropy_with_and_without_mean_absolute_error_follow_their_definitions():
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


def test_an_alpha_outside_0_to_1_is_refused():
    with pytest.raises(ConfigError, match="alpha"):
        losses.ReconstructionLoss(1.5)


def test_invalid_input_is_refused():
    for bad in (torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)):
        for loss in (losses.CrossEntropyLoss(), losses.CrossEntropyMAELoss()):
            with pytest.raises(LossInputError, match="labels"):
                loss(torch.randn(3, 4), bad)
    with pytest.raises(LossInputError, match="differ in shape"):
        losses.ReconstructionLoss()(torch.zeros(2, 3), torch.zeros(2, 4))
