"""Images as tensors on their device: copied without waiting, cropped and resized, flipped, normalized."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..levels import check_depth, dtype_of, full_scale, movable


def copy_async(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without waiting for the work that is queued there."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device, non_blocking=True)
    # The caching host allocator does not reuse pinned memory before the copy out of it is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def interpolation_matrices(
    start: Tensor, length: Tensor, source: int, size: int, flip: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """float32 [..., size, source]: row t has the weights of the source pixels in target pixel t.

    The antialiased bilinear (triangle) filter of torch.nn.functional.interpolate, restricted to the pixels
    start .. start+length-1 and normalized; rows sum to `scale`. start, length: [...]; flip: bool [...],
    reverses rows.
    """
    start, length = start.float().unsqueeze(-1), length.float().unsqueeze(-1)
    step = length / size
    sharpness = (1 / step).clamp(max=1)  # 1 / half-width of the triangle, which widens when shrinking
    target = torch.arange(size, device=start.device, dtype=torch.float32)
    if flip is not None:
        target = torch.where(flip.unsqueeze(-1), size - 1 - target, target)
    center = (target + 0.5) * step * sharpness
    pixel = torch.arange(source, device=start.device, dtype=torch.float32) - start
    position = torch.where((pixel >= 0) & (pixel < length), (pixel + 0.5) * sharpness, torch.inf)
    weights = (center.unsqueeze(-1) - position.unsqueeze(-2)).abs_().neg_().add_(1).clamp_(min=0)
    return weights.mul_(weights.sum(dim=-1, keepdim=True).reciprocal_().mul_(scale))


def resample(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """uint8 or uint16 [B, C, H, W], each cropped to V boxes -> float32 [C, B, V, size, size] in 0..1.

    boxes: [B, V, 4] (top, left, height, width); flip: bool [B, V], left to right. Equal to torchvision's
    resized_crop(antialias=True) on float images. Channels come first because color operations work on whole planes.
    """
    B, C, H, W = images.shape
    V = boxes.shape[1]
    top, left, height, width = boxes.unbind(dim=-1)
    wy = interpolation_matrices(top, height, H, size, scale=1 / full_scale(images.dtype))
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


def cut_windows(images: Tensor, boxes: Tensor, size: int, padding: int, mode: str) -> Tensor:
    """Levels [n, C, H, W] -> [n, C, size, size]: one square of each image with `padding` more pixels on each side.

    boxes: int64 [n, 4] (top, left, ...) from -padding on (see crop_boxes.draw_padded_boxes). mode: zeros, or reflect
    (without repeating the edge; padding < H and W).
    """
    dtype, images = images.dtype, movable(images)
    H, W = images.shape[2:]
    if mode == "reflect":
        rows, columns = (_reflected(side, padding, images.device) for side in (H, W))
        padded = images.index_select(2, rows).index_select(3, columns)
    else:
        padded = F.pad(images, [padding] * 4)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # a view: [n, C, places, places, size, size]
    top, left = boxes[:, 0] + padding, boxes[:, 1] + padding
    return windows[torch.arange(len(images), device=images.device), :, top, left].view(dtype)


def _reflected(side: int, padding: int, device: torch.device) -> Tensor:
    """int64 [side + 2 padding]: which row of an image each row of the padded one is."""
    place = torch.arange(-padding, side + padding, device=device).abs()
    return (side - 1) - ((side - 1) - place).abs()


def flip_selected(images: Tensor, rows: Tensor, flip: Tensor) -> Tensor:
    """Rows (int64 [n], on the CPU) of levels [m, C, S, S], copied; those with flip (bool [n], on the CPU) mirrored.

    The memory layout is kept. Gathering rows is ten times faster on a CPU than scattering them.
    """
    dtype, images = images.dtype, movable(images)
    contiguous = images.is_contiguous()
    memory = images if contiguous else images.permute(0, 2, 3, 1)
    device, chosen = images.device, torch.where(flip)[0]
    unchanged = memory.index_select(0, copy_async(rows, device))
    mirrored = memory.index_select(0, copy_async(rows[chosen], device)).flip(3 if contiguous else 2)
    sources = torch.arange(len(rows))
    sources[chosen] = torch.arange(len(rows), len(rows) + len(chosen))
    result = torch.cat((unchanged, mirrored)).index_select(0, copy_async(sources, device))
    return (result if contiguous else result.permute(0, 3, 1, 2)).view(dtype)


def planes_of(levels: Tensor) -> Tensor:
    """Levels [n, C, S, S] -> float32 [C, n, S, S] in 0..1."""
    planes = levels.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.mul_(1 / full_scale(levels.dtype))


def normalize_(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std in place; x float [C, ...], mean and std [C]."""
    shape = (-1, *[1] * (x.ndim - 1))
    # addcmul would not be vectorized here, because two of its operands are broadcast
    return x.mul_(std.reciprocal().view(shape)).sub_((mean / std).view(shape))


def normalize_levels_(x: Tensor, mean: Tensor, std: Tensor, full: int = 255) -> Tensor:
    """(x / full - mean) / std in place; x float [n, C, H, W], contiguous or channels last."""
    if x.is_contiguous():
        return normalize_(x.transpose(0, 1), full * mean, full * std).transpose(0, 1)
    # over whole rows of pixels: a loop over three channels is not vectorized
    rows, W = x.permute(0, 2, 3, 1).flatten(2), x.shape[3]
    rows.mul_((full * std).reciprocal().repeat(W)).sub_((mean / std).repeat(W))
    return x


class EvalTransform(nn.Module):
    """uint8 or uint16 [B, C, H, W] -> float32 [B, C, H, W], normalized: the input in evaluation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float], bits: int = 8) -> None:
        """mean, std: [C] in units of 0..1 of full scale; bits: 8 or 16, of the images."""
        super().__init__()
        self.dtype = dtype_of(bits)
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        check_depth(images.dtype, self.dtype)
        scaled = images.float().mul_(1 / full_scale(self.dtype)).transpose(0, 1)
        return normalize_(scaled, self.mean, self.std).transpose(0, 1)


def to_levels(x: Tensor) -> Tensor:
    """float32 [C, n, S, S] in 0..1 -> uint8 [n, C, S, S], the nearest gray levels."""
    levels = x.mul(255).round_().clamp_(0, 255).transpose(0, 1)
    return levels.to(torch.uint8, memory_format=torch.contiguous_format)


def span(rows: Tensor) -> slice:
    """The slice of consecutive rows."""
    return slice(int(rows[0]), int(rows[-1]) + 1)
