"""Views as gray levels and as planes of color."""

from __future__ import annotations

import torch
from torch import Tensor


def to_levels(x: Tensor) -> Tensor:
    """float32 [C, n, S, S] in 0..1 -> uint8 [n, C, S, S], the nearest gray levels."""
    levels = x.mul(255).round_().clamp_(0, 255).transpose(0, 1)
    return levels.to(torch.uint8, memory_format=torch.contiguous_format)


def to_planes(levels: Tensor) -> Tensor:
    """uint8 [n, C, S, S] -> float32 [C, n, S, S] in 0..1."""
    return levels.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)


def span(rows: Tensor) -> slice:
    """The slice of consecutive rows."""
    return slice(int(rows[0]), int(rows[-1]) + 1)
