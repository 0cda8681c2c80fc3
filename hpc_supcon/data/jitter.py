"""Colour jitter of a batch of views: each with its own operations, factors and sequence of operations."""

from __future__ import annotations

from itertools import pairwise, permutations

import torch
from torch import Tensor

from .colour import HUE, adjust_hue, blend
from .transfer import send

CPU_GROUP = 64
"""Views whose colour is worked on at once on a CPU: 32x32 RGB ones stay in a core's cache."""


class Jitter:
    """Brightness, contrast, saturation and hue in a random order, as torchvision's ColorJitter does per image."""

    def __init__(self, strengths: tuple[float, float, float, float], probability: float) -> None:
        """strengths: of brightness, contrast, saturation (>= 0) and hue (0..0.5 turns); 0 leaves one out.

        Factors are drawn from max(0, 1 - x)..1 + x, the hue from -x..x. probability: that a view is jittered.
        """
        low = [max(0.0, 1 - s) for s in strengths[:3]] + [-strengths[3]]
        high = [1 + s for s in strengths[:3]] + [strengths[3]]
        self._factor_range = torch.tensor([low, high])
        active = [k for k, strength in enumerate(strengths) if strength > 0]
        self.orders = tuple(permutations(active)) if active else ()
        self.sequences = torch.tensor([[*order, *[-1] * (4 - len(order))] for order in self.orders] + [[-1] * 4])
        """int64 [len(orders) + 1, 4]: the operations of each order, -1 for none; row -1 has none at all."""
        self.turns_hue = HUE in active
        self.probability = probability if active else 0.0
        # Per order: how many blends come before the hue, and which blends, one after the other.
        self._hue_place = torch.tensor([order.index(HUE) if self.turns_hue else 0 for order in self.orders])
        blends = [[k for k in order if k != HUE] for order in self.orders]
        self._blends = torch.tensor(blends, dtype=torch.int64)

    def draw(self, chance: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Factors float32 [n, 4] and order int64 [n], an index into `orders` or -1; chance: [n] in 0..1."""
        n = len(chance)
        low, high = self._factor_range
        factors = torch.rand(n, 4, generator=generator) * (high - low) + low
        order = torch.randint(max(len(self.orders), 1), (n,), generator=generator)
        return factors, torch.where(chance < self.probability, order, -1)

    def __call__(self, x: Tensor, factors: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """x float32 [C, n, S, S] in 0..1, jittered, in another sequence of views, and that sequence (int64 [n]).

        Views whose hue is turned at the same place in their order are put side by side, so that an operation
        runs on all of them at once: what comes before and after the hue are blends, whatever their order.
        """
        turn = torch.where(order < 0, -1, self._hue_place[order])
        rows = torch.argsort(turn, stable=True)
        blends = self._blends[order[rows]]
        factors = factors[rows]
        hue = send(factors[:, HUE], x.device)
        strength = send(factors.gather(1, blends), x.device)
        blends = send(blends, x.device)
        x = x.index_select(1, send(rows, x.device))

        size = CPU_GROUP if x.device.type == "cpu" else len(rows)
        ends = torch.bincount(turn + 1, minlength=blends.shape[1] + 2).cumsum(0).tolist()
        for place, (start, end) in enumerate(pairwise(ends)):  # views of place -1 lie before ends[0]: no jitter
            for first in range(start, end, size):
                part = slice(first, min(first + size, end))
                self._operate(x[:, part], place, hue[part], blends[part], strength[part])
        return x, rows

    def _operate(self, x: Tensor, place: int, hue: Tensor, blends: Tensor, strength: Tensor) -> None:
        """Turn the hue after `place` of the blends [n, steps], all in place on x [C, n, S, S]."""
        for step in range(blends.shape[1] + 1):
            if self.turns_hue and step == place:
                adjust_hue(x, hue)
            if step < blends.shape[1]:
                blend(x, blends[:, step], strength[:, step])
