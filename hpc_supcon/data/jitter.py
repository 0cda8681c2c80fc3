"""Colour jitter of a batch of views: each with its own operations, factors and sequence of operations."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor, nn

from .colour import HUE, adjust_hue, blend
from .prefetch import sent


class Jitter(nn.Module):
    """Brightness, contrast, saturation and hue in a random order, as torchvision's ColorJitter does per image."""

    factor_range: Tensor
    """float32 [2, 4]: lowest and highest factor of each operation."""
    sequences: Tensor
    """int64 [len(orders) + 1, 4]: the operations of each order, -1 for none; row -1 has none at all."""

    def __init__(self, strengths: tuple[float, float, float, float], probability: float) -> None:
        """strengths: of brightness, contrast, saturation (>= 0) and hue (0..0.5 turns); 0 leaves one out.

        Factors are drawn from max(0, 1 - x)..1 + x, the hue from -x..x. probability: that a view is jittered.
        """
        super().__init__()
        low = [max(0.0, 1 - s) for s in strengths[:3]] + [-strengths[3]]
        high = [1 + s for s in strengths[:3]] + [strengths[3]]
        self.register_buffer("factor_range", torch.tensor([low, high]), persistent=False)
        active = [k for k, strength in enumerate(strengths) if strength > 0]
        self.orders = tuple(permutations(active)) if active else ()
        sequences = torch.tensor([[*order, *[-1] * (4 - len(order))] for order in self.orders] + [[-1] * 4])
        self.register_buffer("sequences", sequences, persistent=False)
        self.turns_hue = HUE in active
        self.probability = probability if active else 0.0
        # On the CPU, where it is decided what runs. Per order: how many blends come before the hue, and which ones.
        self._hue_place = torch.tensor([order.index(HUE) if self.turns_hue else 0 for order in self.orders])
        blends = [[k for k in order if k != HUE] for order in self.orders]
        self._blends = torch.tensor(blends, dtype=torch.int64)

    def draw(self, chance: Tensor, decisions: torch.Generator, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
        """Factors float32 [n, 4] where `numbers` is, and order int64 [n], an index into `orders` or -1.

        chance: [n] in 0..1, on the CPU, as `decisions` is.
        """
        n, (low, high) = len(chance), self.factor_range
        factors = torch.rand(n, 4, generator=numbers, device=low.device) * (high - low) + low
        order = torch.randint(max(len(self.orders), 1), (n,), generator=decisions)
        return factors, torch.where(chance < self.probability, order, -1)

    def groups(self, order: Tensor) -> list[Tensor]:
        """Rows int64 [k] of the views that are worked on together; each view is in one group. order: [n], CPU.

        What comes before and after the hue are blends, whatever their order, so a group has one place for it.
        """
        turn = torch.where(order < 0, -1, self._hue_place[order])
        rows = torch.argsort(turn, stable=True)
        return [group for group in rows.split(torch.bincount(turn + 1).tolist()) if len(group)]

    def forward(self, x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        """x float32 [C, n, S, S] in 0..1, a part of one group of views, jittered in place; order: [n], CPU."""
        if order[0] < 0:
            return x
        place, blends = int(self._hue_place[order[0]]), sent(self._blends[order], x.device)
        strength = factors.gather(1, blends)
        for step in range(blends.shape[1] + 1):
            if self.turns_hue and step == place:
                adjust_hue(x, factors[:, HUE])
            if step < blends.shape[1]:
                blend(x, blends[:, step], strength[:, step])
        return x
