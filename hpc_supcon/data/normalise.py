"""Pixels in units of the training images' mean and standard deviation per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def normalise_(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std in place; x float [C, ...], mean and std [C]."""
    shape = (-1, *[1] * (x.ndim - 1))
    return torch.addcmul((-mean / std).view(shape), x, std.reciprocal().view(shape), out=x)


class EvalTransform(nn.Module):
    """uint8 [B, C, H, W] -> float32 [B, C, H, W], normalised: what evaluation sees."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> None:
        """mean, std: [C] in units of 0..1."""
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        scaled = images.float().mul_(1 / 255).transpose(0, 1)
        return normalise_(scaled, self.mean, self.std).transpose(0, 1)
