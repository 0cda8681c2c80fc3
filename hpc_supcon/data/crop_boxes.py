"""Boxes of random resized crops, distributed as torchvision's RandomResizedCrop.get_params draws them.

A box is top, left, height and width in pixels. `draw_boxes` draws from a torch generator, on its device, for images
of one size; `crop_boxes` is a pure function of seed, epoch, image and view, for images of any sizes; `central_boxes`
are those without random crops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .philox import FloatArray, IntArray, uniform

TRIES = 10
"""Boxes drawn before the central one is taken."""
_DrawSizes = Callable[..., tuple[Tensor, Tensor]]


def check_crops(views: int, image_size: int, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Raise ConfigError for a number of views, a size in pixels or a range that no crop can have."""
    if views < 1 or image_size < 1:
        raise ConfigError(f"crops need views >= 1 and image_size >= 1, not {views} and {image_size}")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ConfigError(f"crop_scale must be [low, high] within (0, 1], not {list(scale)}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ConfigError(f"crop_ratio must be [low, high] above 0, not {list(ratio)}")


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
    """int64 [n, 4] on `device`: random boxes in images of this size in pixels.

    scale: range of the box's share of the area; ratio: range of width / height, uniform in its logarithm.
    generator: of that device.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])

    def draw_sizes(*shape: int) -> tuple[Tensor, Tensor]:
        """Height and width, float64 [*shape, 2], and whether they fit into the image, bool [*shape]."""
        u = torch.rand(2, *shape, dtype=torch.float64, generator=generator, device=device)
        h, w, fits = _sizes(torch, u[0], u[1], height, width, scale, log_ratio)
        return torch.stack((h, w), dim=-1), fits

    central = tuple(int(side) for side in central_size(height, width, ratio))
    first_fit = _draw_until_fit if torch.device(device).type == "cpu" else _draw_all_tries
    size, found = first_fit(n, draw_sizes, central)
    room = torch.stack((height - size[:, 0], width - size[:, 1]), dim=1)
    u = torch.rand(n, 2, dtype=torch.float64, generator=generator, device=device)
    return torch.cat((_corner(torch, u, room, found.unsqueeze(1)), size), dim=1).long()


def draw_padded_boxes(
    n: int,
    height: int,
    width: int,
    size: int,
    padding: int,
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Tensor:
    """int64 [n, 4] on `device`: random squares of `size` pixels in images with `padding` more pixels on each side.

    As torchvision's RandomCrop(size, padding) draws them; rows and columns count from the image's own corner, so a
    square may begin at -padding. Raises ConfigError where the padded image is smaller than a square.
    """
    room = [side + 2 * padding - size for side in (height, width)]
    if min(room) < 0:
        raise ConfigError(
            f"images of {height}x{width} pixels with augment.padding={padding} have no square of {size} pixels: "
            "raise augment.padding, or set data.image_size"
        )
    corners = [
        torch.randint(-padding, space - padding + 1, (n,), generator=generator, device=device) for space in room
    ]
    return torch.stack((*corners, *[torch.full_like(corners[0], size)] * 2), dim=1)


def _draw_until_fit(n: int, draw_sizes: _DrawSizes, central: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Sizes float64 [n, 2] and whether one fitted, bool [n] (else `central`): only misfits are drawn again."""
    size, missing = torch.tensor(central, dtype=torch.float64).repeat(n, 1), torch.arange(n)
    for _ in range(TRIES):
        sizes, fits = draw_sizes(len(missing))
        size[missing[fits]] = sizes[fits]
        missing = missing[~fits]
        if not len(missing):
            break
    return size, torch.ones(n, dtype=torch.bool).index_fill_(0, missing, False)


def _draw_all_tries(n: int, draw_sizes: _DrawSizes, central: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """As `_draw_until_fit`, for devices: counting the misfits would make the host wait, so all tries are drawn."""
    sizes, fits = draw_sizes(TRIES, n)
    first = fits.byte().argmax(dim=0).view(1, n, 1).expand(1, n, 2)
    found = fits.any(dim=0)
    h, w = sizes.gather(0, first)[0].unbind(1)
    return torch.stack((torch.where(found, h, central[0]), torch.where(found, w, central[1])), dim=1), found


def crop_boxes(
    seed: int,
    epoch: int,
    index: IntArray,
    heights: IntArray,
    widths: IntArray,
    *,
    views: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> IntArray:
    """int64 [B, views, 4]: random boxes, the same ones for the same seed, epoch, image and view.

    index, heights, widths: int64 [B], which image of the source each is and its size. 0 <= seed < 2^64. scale,
    ratio: see `draw_boxes`.
    """
    u = uniform(seed, epoch, index, views, 2 * TRIES + 2)
    H, W = heights[:, None], widths[:, None]
    h, w, fits = _sizes(np, u[:TRIES], u[TRIES : 2 * TRIES], H, W, scale, np.log(ratio))
    found = fits.any(axis=0)
    first = fits.argmax(axis=0)[None]
    central_h, central_w = central_size(H, W, ratio)
    h = np.where(found, np.take_along_axis(h, first, 0)[0], central_h)
    w = np.where(found, np.take_along_axis(w, first, 0)[0], central_w)
    top, left = _corner(np, u[2 * TRIES], H - h, found), _corner(np, u[2 * TRIES + 1], W - w, found)
    return np.stack((top, left, h, w), axis=-1).astype(np.int64)


def central_boxes(heights: IntArray, widths: IntArray, size: int) -> FloatArray:
    """float64 [B, 1, 4]: what `resize_and_crop` shows of each image in `size` x `size` pixels.

    Nearly the largest central square: it is a whole number of pixels of the resized image, so its edges lie between
    those of the image as stored, up to half a resized pixel off the square's.
    """
    sides = np.stack((heights, widths), axis=-1)
    resized = size * sides // sides.min(axis=-1, keepdims=True)
    scale = sides / resized
    return np.concatenate(((resized - size) // 2 * scale, size * scale), axis=-1)[:, None]


def central_size(height: Any, width: Any, ratio: tuple[float, float]) -> tuple[IntArray, IntArray]:
    """Height and width of the largest central box whose width / height is within `ratio`.

    height, width: int or int64 arrays. A side is at least 1 px, where torchvision returns 0 for an image of a few
    pixels and a ratio far from 1, which cannot be resized.
    """
    h = np.where(ratio[0] * height > width, np.rint(width / ratio[0]), height)
    w = np.where(ratio[1] * height < width, np.rint(height * ratio[1]), width)
    return np.maximum(h, 1).astype(np.int64), np.maximum(w, 1).astype(np.int64)


def _sizes(
    xp: Any, u_area: Any, u_aspect: Any, height: Any, width: Any, scale: tuple[float, float], log_ratio: Any
) -> tuple[Any, Any, Any]:
    """(heights, widths, whether they fit into the image) from uniform numbers in [0, 1).

    xp: torch or numpy, whose arrays the numbers are; the results are of their shape and dtype.
    """
    area = (u_area * (scale[1] - scale[0]) + scale[0]) * (height * width)
    aspect = xp.exp(u_aspect * (log_ratio[1] - log_ratio[0]) + log_ratio[0])
    h, w = xp.round(xp.sqrt(area / aspect)), xp.round(xp.sqrt(area * aspect))
    return h, w, (h > 0) & (h <= height) & (w > 0) & (w <= width)


def _corner(xp: Any, u: Any, room: Any, found: Any) -> Any:
    """First row or column of boxes with `room` pixels to move in: uniform, or central where no box fitted."""
    return xp.floor(xp.where(found, u * (room + 1), room / 2))
