"""Images of any number of channels and 8 or 16 bits as what can be looked at: 8-bit gray or RGB.

The first three channels are shown as red, green and blue, or the first one as gray where there are two. 8-bit images
of 1 or 3 channels are shown as they are; of all others each channel is stretched from its 2nd to its 98th percentile
over the images shown, for one that uses part of the levels, such as 12 bits of 16, would be black.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..data import is_picture

PERCENTILES = (2, 98)
_SAMPLE = 1 << 20
"""Levels of a channel from which its percentiles are taken, at most."""

Range = tuple[Tensor, Tensor]
"""The levels that are shown as black and as full brightness, float32 [c, 1, 1], of the channels shown."""


def pictures_of(images: Tensor) -> Tensor:
    """uint8 or uint16 [n, C, H, W] -> uint8 [n, 1 or 3, H, W] to look at."""
    if is_picture(images.shape[1], images.dtype):
        return images
    return stretched(images, shown_range(images)).mul_(255).round_().to(torch.uint8)


def shown_range(images: Tensor) -> Range:
    """By the percentiles of all `images` [n, C, H, W], of any dtype."""
    channels = images[:, : _shown(images.shape[1])].transpose(0, 1).flatten(1).float()
    every = -(-channels.shape[1] // _SAMPLE)
    low, high = np.percentile(channels[:, ::every].cpu().numpy(), PERCENTILES, axis=1).astype(np.float32)
    return torch.from_numpy(low).view(-1, 1, 1), torch.from_numpy(high).view(-1, 1, 1)


def stretched(images: Tensor, shown: Range) -> Tensor:
    """[n, C, H, W] -> float32 [n, 1 or 3, H, W] in 0..1, on the CPU. A channel of one level is black."""
    low, high = shown
    pixels = images[:, : _shown(images.shape[1])].float().cpu()
    return (pixels - low).div_((high - low).clamp(min=1e-12)).clamp_(0, 1)


def _shown(channels: int) -> int:
    return 3 if channels >= 3 else 1
