"""Gaussian blur of a batch of views, each with a width of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SIGMA = (0.1, 2.0)
"""Range of the standard deviation in pixels, as SimCLR draws it (Chen et al. 2020, appendix A)."""


def kernel_size(image_size: int) -> int:
    """Odd side of the kernel in pixels: a tenth of the image's, as SimCLR's, and at least 3."""
    return max(3, image_size // 10 | 1)


def gaussian_blur(x: Tensor, sigma: Tensor, size: int) -> Tensor:
    """float32 [C, n, H, W] -> the same, new, blurred with a standard deviation sigma [n] > 0 in pixels.

    size: side of the kernel, odd; H and W must be larger than size // 2, by which the edges are reflected.
    Equal to torchvision's gaussian_blur per image. Sums of shifted copies, not a convolution: one with as many
    groups as planes is slower on the CPU and would run in TF32 on CUDA.
    """
    reach = size // 2
    offset = torch.arange(-reach, reach + 1, dtype=torch.float32, device=x.device) / math.sqrt(2)
    weights = torch.softmax((offset / sigma[:, None]).square_().neg_(), dim=1)  # [n, size]
    for axis in (3, 2):
        padding = (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach)
        padded = F.pad(x, padding, mode="reflect")
        length = x.shape[axis]
        x = padded.narrow(axis, reach, length) * _per_image(weights[:, reach])
        for distance in range(1, reach + 1):
            both = padded.narrow(axis, reach - distance, length) + padded.narrow(axis, reach + distance, length)
            x.addcmul_(both, _per_image(weights[:, reach - distance]))
    return x


def _per_image(value: Tensor) -> Tensor:
    return value.view(1, -1, 1, 1)
