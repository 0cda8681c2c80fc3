"""Random resized crops of a whole batch: boxes drawn per view, resampled and flipped in two matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..loaders.prefetch import sent

TRIES = 10
"""Boxes drawn before falling back to the center, as torchvision's RandomResizedCrop does."""
_Drawn = Callable[..., tuple[Tensor, Tensor]]


def draw_boxes(
    n: int,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Tensor:
    """int64 [n, 4] on `device`: top, left, height, width in pixels, distributed as RandomResizedCrop.get_params.

    scale: range of the share of the area; ratio: range of width / height, drawn uniformly in its logarithm.
    generator: of that device.
    """
    low, high = (math.log(r) for r in ratio)

    def drawn(*shape: int) -> tuple[Tensor, Tensor]:
        """Height and width, float64 [*shape, 2], and whether they fit into the image."""
        u = torch.rand(2, *shape, dtype=torch.float64, generator=generator, device=device)
        area = (u[0] * (scale[1] - scale[0]) + scale[0]).mul_(height * width)
        aspect = (u[1] * (high - low) + low).exp_()
        h, w = (area / aspect).sqrt_().round_(), (area * aspect).sqrt_().round_()
        return torch.stack((h, w), dim=-1), (w > 0) & (w <= width) & (h > 0) & (h <= height)

    central = _central_size(height, width, ratio)
    size, found = (_retried if torch.device(device).type == "cpu" else _at_once)(n, drawn, central)
    room = torch.stack((height - size[:, 0], width - size[:, 1]), dim=1)
    u = torch.rand(n, 2, dtype=torch.float64, generator=generator, device=device)
    # where none fits in the center, as torchvision's
    corner = torch.where(found.unsqueeze(1), u.mul_(room + 1), room / 2).floor_()
    return torch.cat((corner, size), dim=1).long()


def _retried(n: int, drawn: _Drawn, central: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sizes float64 [n, 2] and whether one fitted (bool [n]; else `central`): few have to be drawn again."""
    size, missing = torch.tensor(central, dtype=torch.float64).repeat(n, 1), torch.arange(n)
    for _ in range(TRIES):
        sizes, fits = drawn(len(missing))
        size[missing[fits]] = sizes[fits]
        missing = missing[~fits]
        if not len(missing):
            break
    return size, torch.ones(n, dtype=torch.bool).index_fill_(0, missing, False)


def _at_once(n: int, drawn: _Drawn, central: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The same where it would have to be waited for how many are to be drawn again: all tries in one go."""
    sizes, fits = drawn(TRIES, n)
    first = fits.byte().argmax(dim=0).view(1, n, 1).expand(1, n, 2)
    found = fits.any(dim=0)
    h, w = sizes.gather(0, first)[0].unbind(1)
    return torch.stack((torch.where(found, h, central[0]), torch.where(found, w, central[1])), dim=1), found


def _central_size(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return h, w


def interpolation_matrices(
    start: Tensor, length: Tensor, source: int, size: int, flip: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """float32 [..., size, source]: row t holds the weights of the source pixels in target pixel t.

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
    """uint8 [B, C, H, W] cropped to V boxes each -> float32 [C, B, V, size, size] in 0..1.

    boxes: [B, V, 4] (top, left, height, width); flip: bool [B, V], left to right. Equal to torchvision's
    resized_crop(antialias=True) on float images. Channels come first because color works on whole planes.
    """
    B, C, H, W = images.shape
    V = boxes.shape[1]
    top, left, height, width = boxes.unbind(dim=-1)
    wy = interpolation_matrices(top, height, H, size, scale=1 / 255)
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


def flipped(images: Tensor, rows: Tensor, flip: Tensor) -> Tensor:
    """Rows (int64 [n], on the CPU) of uint8 [m, C, S, S], new, those chosen (bool [n], there too) mirrored.

    The memory layout is kept. A CPU reads chosen rows ten times faster than it writes to them.
    """
    planes = images.is_contiguous()
    memory = images if planes else images.permute(0, 2, 3, 1)
    plain, chosen = memory.index_select(0, sent(rows, images.device)), torch.where(flip)[0]
    mirrored = memory.index_select(0, sent(rows[chosen], images.device)).flip(3 if planes else 2)
    sources = torch.arange(len(rows))
    sources[chosen] = torch.arange(len(rows), len(rows) + len(chosen))
    made = torch.cat((plain, mirrored)).index_select(0, sent(sources, images.device))
    return made if planes else made.permute(0, 3, 1, 2)
