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
    rest = _per_image(1 - factor)
    shade = grey(x)
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


def grey(x: Tensor) -> Tensor:
    """float32 [1, N, H, W], new: the luminance, or the only channel there is."""
    if x.shape[0] == 1:
        return x.clone()
    return (x[0] * LUMA[0]).add_(x[1], alpha=LUMA[1]).add_(x[2], alpha=LUMA[2]).unsqueeze(0)


def _per_image(value: Tensor) -> Tensor:
    return value.view(1, -1, 1, 1)
