"""Random resized crops of a whole batch: boxes drawn per view, resampled and flipped in two matrix products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TRIES = 10
"""Boxes drawn before falling back to the centre, as torchvision's RandomResizedCrop does."""


def draw_boxes(
    n: int,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """int64 [n, 4]: top, left, height, width in pixels, distributed as RandomResizedCrop.get_params.

    scale: range of the share of the area; ratio: range of width / height, drawn uniformly in its logarithm.
    """
    size = torch.tensor(_central_size(height, width, ratio), dtype=torch.float64).repeat(n, 1)
    missing = torch.arange(n)
    low, high = (math.log(r) for r in ratio)
    for _ in range(TRIES):
        u = torch.rand(2, len(missing), dtype=torch.float64, generator=generator)
        area = (u[0] * (scale[1] - scale[0]) + scale[0]).mul_(height * width)
        aspect = (u[1] * (high - low) + low).exp_()
        drawn = torch.stack(((area / aspect).sqrt_(), (area * aspect).sqrt_()), dim=1).round_()
        h, w = drawn.unbind(1)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        size[missing[fits]] = drawn[fits]
        missing = missing[~fits]
        if not len(missing):
            break
    room = torch.tensor([height, width]) - size
    corner = torch.rand(n, 2, dtype=torch.float64, generator=generator).mul_(room + 1).floor_()
    corner[missing] = (room[missing] / 2).floor_()  # in the centre, as torchvision's
    return torch.cat((corner, size), dim=1).long()


def _central_size(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return h, w


def interpolation_matrices(
    start: Tensor, length: Tensor, source: int, size: int, flip: Tensor | None = None
) -> Tensor:
    """float32 [..., size, source]: row t holds the weights of the source pixels in target pixel t.

    The antialiased bilinear (triangle) filter of torch.nn.functional.interpolate, restricted to the pixels
    start .. start+length-1 and normalised; rows sum to 1. start, length: [...]; flip: bool [...], reverses rows.
    """
    start, length = start.float().unsqueeze(-1), length.float().unsqueeze(-1)
    step = length / size
    sharpness = (1 / step).clamp(max=1)  # 1 / half-width of the triangle, which widens when shrinking
    target = torch.arange(size, device=start.device, dtype=torch.float32)
    if flip is not None:
        target = torch.where(flip.unsqueeze(-1), size - 1 - target, target)
    centre = (target + 0.5) * step * sharpness
    pixel = torch.arange(source, device=start.device, dtype=torch.float32) - start
    position = torch.where((pixel >= 0) & (pixel < length), (pixel + 0.5) * sharpness, torch.inf)
    weights = (centre.unsqueeze(-1) - position.unsqueeze(-2)).abs_().neg_().add_(1).clamp_(min=0)
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def resample(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """uint8 [B, C, H, W] cropped to V boxes each -> float32 [C, B, V, size, size] in 0..1.

    boxes: [B, V, 4] (top, left, height, width); flip: bool [B, V], left to right. Equal to torchvision's
    resized_crop(antialias=True) on float images. Channels come first because colour works on whole planes.
    """
    B, C, H, W = images.shape
    V = boxes.shape[1]
    top, left, height, width = boxes.unbind(dim=-1)
    wy = interpolation_matrices(top, height, H, size).div_(255)
    wx = interpolation_matrices(left, width, W, size, flip)
    # All V views of an image come from one copy of it: its rows are one matrix [H, C*W] ...
    rows = torch.empty(B, H, C, W, device=images.device)
    rows.copy_(images.permute(0, 2, 1, 3))
    rows = torch.bmm(wy.view(B, V * size, H), rows.view(B, H, C * W)).view(B * V, size, C, W)
    # ... and the columns follow per view and channel.
    out = torch.empty(C, B * V, size, size, device=images.device)
    wx_t = wx.view(B * V, size, W).transpose(1, 2)
    for c in range(C):
        torch.bmm(rows[:, :, c], wx_t, out=out[c])
    return out.view(C, B, V, size, size)
