"""Normalization by mean and standard deviation per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def normalize_(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std in place; x float [C, ...], mean and std [C]."""
    shape = (-1, *[1] * (x.ndim - 1))
    # addcmul would not be vectorized here, because two of its operands are broadcast
    return x.mul_(std.reciprocal().view(shape)).sub_((mean / std).view(shape))


def normalize_levels_(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x / 255 - mean) / std in place; x float [n, C, H, W], contiguous or channels last."""
    if x.is_contiguous():
        return normalize_(x.transpose(0, 1), 255 * mean, 255 * std).transpose(0, 1)
    # over whole rows of pixels: a loop over three channels is not vectorized
    rows, W = x.permute(0, 2, 3, 1).flatten(2), x.shape[3]
    rows.mul_((255 * std).reciprocal().repeat(W)).sub_((mean / std).repeat(W))
    return x


class EvalTransform(nn.Module):
    """uint8 [B, C, H, W] -> float32 [B, C, H, W], normalized: the input in evaluation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> None:
        """mean, std: [C] in units of 0..1."""
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        scaled = images.float().mul_(1 / 255).transpose(0, 1)
        return normalize_(scaled, self.mean, self.std).transpose(0, 1)
