"""Colour operations on planes, with a factor per image: torchvision's adjust_* for a batch of different factors.

Images are float32 [C, N, H, W] in 0..1, channels first: hue and grey mix channels, and do so fastest on whole
planes. All functions work IN PLACE and return their argument. Factors are float32 [N].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sources import LUMA

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Operations, numbered as in torchvision's ColorJitter."""


def blend(x: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """x * factor + (1 - factor) * target, clamped to 0..1, with a target per image.

    operation: int64 [N]. BRIGHTNESS blends with black, CONTRAST with the image's mean grey, SATURATION with its
    grey. factor: float32 [N], >= 0; 1 changes nothing. One function for the three, because images whose
    operations come in different orders can then be worked on together.
    """
    factor, rest = _per_image(factor), _per_image(1 - factor)
    shade = grey(x)
    mean = shade.mean(dim=(-2, -1), keepdim=True).mul_(rest * _per_image(operation == CONTRAST))
    target = shade.mul_(rest * _per_image(operation == SATURATION)).add_(mean)
    return x.mul_(factor).add_(target).clamp_(0, 1)


def adjust_hue(x: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue by `factor` turns, -0.5..0.5. Needs 3 channels.

    Through HSV, without naming the six sectors: channel c of a hue h (in turns) is
    v - (v - min) * clamp(2 - |6 d|, 0, 1), with d the distance around the circle from h to the hue
    opposite to c, in -1/2..1/2.
    """
    red, green, blue = x
    low, high = torch.aminmax(x, dim=0)
    spread = high - low
    sixth = torch.where(spread == 0, 1.0, spread).mul_(6).reciprocal_()
    hue = torch.where(high == green, (blue - red).mul_(sixth).add_(2 / 6), (red - green).mul_(sixth).add_(4 / 6))
    hue = torch.where(high == red, (green - blue).mul_(sixth), hue)
    hue.add_(_per_image(factor)[0])
    for channel, opposite in enumerate((3 / 6, 5 / 6, 1 / 6)):
        # + 2: frac_ truncates towards zero, and the hue may be down to -4/6
        away = (hue + (2.5 - opposite)).frac_().mul_(6).sub_(3).abs_()
        torch.sub(high, away.neg_().add_(2).clamp_(0, 1).mul_(spread), out=x[channel])
    return x


def grey(x: Tensor) -> Tensor:
    """float32 [1, N, H, W], new: the luminance, or the only channel there is."""
    if x.shape[0] == 1:
        return x.clone()
    return (x[0] * LUMA[0]).add_(x[1], alpha=LUMA[1]).add_(x[2], alpha=LUMA[2]).unsqueeze(0)


def _per_image(value: Tensor) -> Tensor:
    return value.view(1, -1, 1, 1)
