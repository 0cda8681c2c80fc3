"""Pooling to a fixed size from operations that are deterministic on CUDA.

PyTorch's AdaptiveMaxPool2d and AdaptiveAvgPool2d add gradients with atomics on CUDA: under
torch.use_deterministic_algorithms their backward passes raise. These have the same values and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GlobalMaxPool2d(nn.Module):
    """AdaptiveMaxPool2d(1): the largest value of every channel, [N, C, H, W] -> [N, C, 1, 1].

    Of several equal values, the first one receives the gradient.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).max(dim=2).values[..., None, None]


class AveragePool2d(nn.Module):
    """AdaptiveAvgPool2d(size): [N, C, H, W] -> [N, C, size, size], for any H and W."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return average_pool2d(x, self.size, self.size)

    def extra_repr(self) -> str:
        return str(self.size)


def average_pool2d(x: Tensor, height: int, width: int) -> Tensor:
    """adaptive_avg_pool2d: x [N, C, H, W] -> [N, C, height, width]."""
    if x.shape[-2:] == (height, width):
        return x
    # in fp32 at least, as PyTorch's kernels sum; rounded to x's dtype once
    wide = x if x.dtype == torch.float64 else x.float()
    return _average(_average(wide, -2, height), -1, width).to(x.dtype)


def _average(x: Tensor, dim: int, size: int) -> Tensor:
    """Means over `size` windows of dimension `dim`: window i is floor(i n / size) .. ceil((i + 1) n / size) of n."""
    n = x.shape[dim]
    if n == size:
        return x
    if n == 1:
        shape = list(x.shape)
        shape[dim] = size
        return x.expand(shape)
    if n % size == 0:
        return x.unflatten(dim, (size, n // size)).mean(dim)
    windows = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
    return torch.stack([x.narrow(dim, start, stop - start).mean(dim) for start, stop in windows], dim=dim)
