"""Pruning within training, at a rate that grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .scores import PruneTask, score_weights
from .selection import build_masks


def cubic_rate(step: int, *, initial: float, final: float, interval: int, updates: int) -> float:
    """final + (initial - final) (1 - step / (updates x interval))^3, and `final` from then on (Zhu & Gupta 2017,
    arXiv 1710.01878, equation 1, with t_0 = 0)."""
    left = max(0.0, 1 - step / (updates * interval))
    return final + (initial - final) * left**3


@dataclass(frozen=True)
class GradualPruning:
    """Pruning within training: after every `interval`-th step, `updates` times, to the rate of `cubic_rate`.

    The weights are scored anew each time by a method that needs nothing else; what was pruned stays pruned. A pure
    function of the step and the weights, so that a resumed run prunes the same ones.
    """

    method: str
    scope: str
    initial: float
    """Share of the weights that is pruned at the start."""
    final: float
    interval: int
    updates: int
    seed: int

    def due(self, step: int) -> bool:
        """Whether to prune after `step` (counted from 1)."""
        return step % self.interval == 0 and step <= self.interval * self.updates

    def rate(self, step: int) -> float:
        """The share of the weights that is pruned after `step`."""
        return cubic_rate(step, initial=self.initial, final=self.final, interval=self.interval, updates=self.updates)

    def masks(self, step: int, weights: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks after `step`, of which `pruned` are those before. Raises NonFinite."""
        scored = score_weights(self.method, PruneTask(weights, self.seed))
        return build_masks(scored.scores, self.rate(step), self.scope, pruned=pruned)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint's state.json; GradualPruning(**state) is the same."""
        return asdict(self)
