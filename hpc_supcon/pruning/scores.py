"""Scores by magnitude."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def l1(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The absolute value of each weight (Han et al. 2015; torch.nn.utils.prune's L1Unstructured)."""
    return {name: weight.detach().abs() for name, weight in weights.items()}
