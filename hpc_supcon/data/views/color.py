"""Color operations on planes, with a factor per image: torchvision's adjust_* for a batch of different factors.

Images are float32 [C, N, H, W] in 0..1, channels first: hue and gray mix channels, and do so fastest on whole
planes. All functions work IN PLACE and return their argument. Factors are float32 [N].
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor, nn

from ..loaders.prefetch import sent
from ..sources.source import LUMA

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Operations, numbered as in torchvision's ColorJitter."""


def blend(x: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """x * factor + (1 - factor) * target, clamped to 0..1, with a target per image.

    operation: int64 [N]. BRIGHTNESS blends with black, CONTRAST with the image's mean gray, SATURATION with its
    gray. factor: float32 [N], >= 0; 1 changes nothing. One function for the three, because images whose
    operations come in different orders can then be worked on together.
    """
    rest = _per_image(1 - factor)
    shade = grayscale(x)
    mean = shade.mean(dim=(-2, -1), keepdim=True).mul_(rest * _per_image(operation == CONTRAST))
    target = torch.addcmul(mean, shade, rest * _per_image(operation == SATURATION))
    return torch.addcmul(target, x, _per_image(factor), out=x).clamp_(0, 1)


def adjust_hue(x: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue by `factor` turns, -0.5..0.5. Needs 3 channels.

    Through HSV, without naming the six sectors: comparing and choosing costs a CPU ten times what arithmetic
    does. Channel c of a hue h (in turns) is high - (high - low) * w_c, where w_c = clamp(2 - 6 |h - o_c|, 0, 1)
    with o_c the hue opposite to c, around the circle. So |6 h| = 2 + w_red - w_green - w_blue for h within
    -1/2..1/2, and h has the sign of green - blue.
    """
    red, green, blue = x
    high = torch.maximum(red, green)
    torch.maximum(high, blue, out=high)
    spread = torch.minimum(red, green)
    torch.minimum(spread, blue, out=spread)
    torch.sub(high, spread, out=spread)
    # where the spread is 0, so is what it divides, and any hue will do
    turn = (green + blue).sub_(red).sub_(high).div_((spread * 6).clamp_(min=1e-30)).add_(2 / 6)
    turn.copysign_(green - blue).add_(_per_image(factor)[0])
    # 1/2 + h - o_c, by whole turns above 0, because frac_ truncates towards it
    offset = 2 - torch.arange(3, dtype=x.dtype, device=x.device).view(3, 1, 1, 1) / 3
    weight = (turn + offset).frac_().sub_(0.5).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(high, weight, spread, value=-1, out=x)


def grayscale(x: Tensor) -> Tensor:
    """float32 [1, N, H, W], new: the luminance, or the only channel there is."""
    if x.shape[0] == 1:
        return x.clone()
    return (x[0] * LUMA[0]).add_(x[1], alpha=LUMA[1]).add_(x[2], alpha=LUMA[2]).unsqueeze(0)


def _per_image(value: Tensor) -> Tensor:
    return value.view(1, -1, 1, 1)


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
