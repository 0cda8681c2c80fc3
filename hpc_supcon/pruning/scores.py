"""Pruning methods by name: scores of the weights, of which the smallest are pruned first."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor


def l1(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The absolute value of each weight (Han et al. 2015; torch.nn.utils.prune's L1Unstructured)."""
    return {name: weight.detach().abs() for name, weight in weights.items()}


PRUNERS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {"l1": l1}
"""`prune.method` -> scores(weights): by name, a tensor of each weight's shape."""
