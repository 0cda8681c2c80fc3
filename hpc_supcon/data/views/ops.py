"""The operations of AutoAugment and RandAugment on batches of uint8 images, each image with its own operation.

Images are grouped by the way an operation works, and a group is processed at once, whatever its magnitudes:

- point operations map a gray level to a gray level, so each image gets a table [C, 256] and one lookup does
  all of them: Brightness, Contrast (its table contains the image's mean gray), Posterize, Solarize, Invert,
  AutoContrast (stretches each channel from its minimum and maximum to 0..255) and Equalize (the channel's own
  cumulative histogram);
- Color and Sharpness blend with the gray and the smoothed image;
- shears, translations and the rotation sample the nearest pixel through a matrix per image; outside is black.

Every operation returns exactly what torchvision.transforms.v2.functional does for a single uint8 tensor. Blends
are summed in float64 and rounded to float32 once, because torchvision's fuse product and sum: a difference in the
last bit is a whole gray level after truncation. Operations are int64 [n] (indices into OPERATIONS) and magnitudes
float64 [n], both on the CPU, so that grouping does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .color import grayscale
from .pixels import copy_async

OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
    "Invert",
)
"""Magnitudes: Shear: slope. Translate: pixels, truncated. Rotate: degrees counter-clockwise. Brightness, Color,
Contrast, Sharpness: factor - 1. Posterize: bits kept. Solarize: threshold in units of 0..1. Others: unused."""


def operate_(images: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    """One operation on every image of uint8 [n, C, H, W], C 1 or 3, in place; returns `images`."""
    assert images.dtype == torch.uint8, images.dtype
    for names, group in _GROUPS:
        codes = torch.tensor([OPERATIONS.index(name) for name in names])
        rows = torch.where(torch.isin(operations, codes))[0]
        if len(rows):
            device_rows = copy_async(rows, images.device)
            result = group(images.index_select(0, device_rows), operations[rows], magnitudes[rows])
            images.index_copy_(0, device_rows, result)
    return images


# ---- point operations: tables of gray levels


def _look_up(images: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    n, C = images.shape[:2]
    tables = torch.empty(n, C, 256, dtype=torch.uint8, device=images.device)
    for name, table in _TABLES.items():
        rows = torch.where(operations == OPERATIONS.index(name))[0]
        if len(rows):
            device_rows = copy_async(rows, images.device)
            filled = table(images.index_select(0, device_rows), magnitudes[rows])
            tables.index_copy_(0, device_rows, filled.expand(-1, C, -1))
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def _levels(images: Tensor) -> Tensor:
    return torch.arange(256, dtype=torch.float32, device=images.device).expand(len(images), 1, 256)


def _brightness(images: Tensor, magnitudes: Tensor) -> Tensor:
    return _truncate(_levels(images) * _broadcast(1 + magnitudes, images)[..., 0])


def _contrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    # exact up to 256 x 256 pixels: sums of integers below 2**24
    mean = _gray(images).mean(dim=(-2, -1)).unsqueeze(-1)
    return _blend(_levels(images), mean, 1 + magnitudes)


def _posterize(images: Tensor, magnitudes: Tensor) -> Tensor:
    mask = 256 - 2 ** (8 - magnitudes.long())
    return _levels(images).to(torch.uint8) & copy_async(mask.to(torch.uint8), images.device)[:, None, None]


def _solarize(images: Tensor, magnitudes: Tensor) -> Tensor:
    levels, threshold = _levels(images), _broadcast(255 * magnitudes, images)[..., 0]
    return torch.where(levels >= threshold, 255 - levels, levels).to(torch.uint8)


def _invert(images: Tensor, magnitudes: Tensor) -> Tensor:
    return (255 - _levels(images)).to(torch.uint8)


def _autocontrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    low, high = (extreme.float().unsqueeze(-1) for extreme in torch.aminmax(images.flatten(2), dim=2))
    flat = high == low  # one gray level only: unchanged
    scale = torch.where(flat, 1.0, (high - low) * (1.0 / 255))
    return _truncate((_levels(images) - torch.where(flat, 0.0, low)) / scale)


def _equalize(images: Tensor, magnitudes: Tensor) -> Tensor:
    n, C = images.shape[:2]
    pixels = images.shape[2] * images.shape[3]
    index = images.flatten(2).long()
    counts = torch.zeros(n, C, 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, index, torch.ones((), dtype=torch.int64, device=images.device).expand_as(index))
    below = counts.cumsum(2) - counts
    brightest = torch.where(below + counts == pixels, counts, 0).amax(dim=2, keepdim=True)
    step = (pixels - brightest) // 255
    # fewer than 255 pixels below the brightest level: unchanged
    equal = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, equal, _levels(images).long()).to(torch.uint8)


# ---- blends with a second image


def _saturation(images: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    return images if images.shape[1] == 1 else _blend(images.float(), _gray(images), 1 + magnitudes)


def _sharpness(images: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    if min(images.shape[2:]) <= 2:
        return images
    x = images.float()
    H, W = x.shape[2:]
    columns = (x[..., : W - 2] + x[..., 1 : W - 1]).add_(x[..., 2:])
    inner = x[..., 1 : H - 1, 1 : W - 1]
    total = (columns[:, :, : H - 2] + columns[:, :, 1 : H - 1]).add_(columns[:, :, 2:]).add_(inner, alpha=4)
    smooth = total.div_(13).round_()  # thirteenths are never half-way, so the order of summing has no effect
    rest = _broadcast(1 - (1 + magnitudes), images).double()
    out = images.clone()
    out[..., 1 : H - 1, 1 : W - 1] = _truncate(torch.addcmul(inner.double(), smooth.sub_(inner), rest).float())
    return out


def _blend(x: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    """x * factor + other * (1 - factor) as uint8; x and other float32 gray levels, factors float64 [n]."""
    shape = (-1, *[1] * (x.ndim - 1))
    factor, rest = (copy_async(f.float(), x.device).view(shape) for f in (factors, 1 - factors))
    return _truncate(torch.addcmul((x * factor).double(), other.double(), rest.double()).float())


def _gray(images: Tensor) -> Tensor:
    """Luminance rounded down to whole gray levels, float32 [n, 1, H, W]."""
    return grayscale(images.float().transpose(0, 1)).transpose(0, 1).floor_()


def _truncate(x: Tensor) -> Tensor:
    return x.clamp_(0, 255).to(torch.uint8)


def _broadcast(value: Tensor, images: Tensor) -> Tensor:
    return copy_async(value.float(), images.device).view(-1, 1, 1, 1)


# ---- geometry


def _warp(images: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    H, W = images.shape[2:]
    theta = inverse_matrices(operations, magnitudes, H, W).float()
    x = torch.linspace((1 - W) / 2, (W - 1) / 2, W, device=images.device).view(1, 1, W, 1)
    y = torch.linspace((1 - H) / 2, (H - 1) / 2, H, device=images.device).view(1, H, 1, 1)
    # without a matrix product, which would run in TF32 on CUDA and be off by a tenth of a pixel
    scaled = copy_async(theta / torch.tensor([0.5 * W, 0.5 * H]).view(2, 1), images.device)
    a, b, c = scaled.view(-1, 1, 1, 2, 3).unbind(-1)
    grid = (x * a + y * b).add_(c)  # [n, H, W, 2]
    sampled = F.grid_sample(images.float(), grid, mode="nearest", align_corners=False)
    return sampled.to(torch.uint8)


def inverse_matrices(operations: Tensor, magnitudes: Tensor, height: int, width: int) -> Tensor:
    """float64 [n, 2, 3]: from target to source pixels, both relative to the center of the image.

    For ShearX, ShearY, TranslateX, TranslateY and Rotate, as torchvision's affine and rotate compute them: a shear
    leaves the top left corner in place, a rotation the center; translations are by whole pixels.
    """

    def only(name: str, value: Tensor) -> Tensor:
        return torch.where(operations == OPERATIONS.index(name), value, 0.0)

    angle = only("Rotate", torch.deg2rad(-(magnitudes % 360)))
    shear_x, shear_y = only("ShearX", magnitudes.atan()), only("ShearY", magnitudes.atan())
    tx, ty = only("TranslateX", magnitudes.trunc()), only("TranslateY", magnitudes.trunc())
    sheared = (shear_x != 0) | (shear_y != 0)
    cx, cy = (torch.where(sheared, -0.5 * side, 0.0).double() for side in (width, height))
    a = (angle - shear_y).cos() / shear_y.cos()
    b = -(a * shear_x.tan() + angle.sin())
    c = (angle - shear_y).sin() / shear_y.cos()
    d = angle.cos() - c * shear_x.tan()
    shift_x = cx - d * (cx + tx) + b * (cy + ty)
    shift_y = cy + c * (cx + tx) - a * (cy + ty)
    return torch.stack((d, -b, shift_x, -c, a, shift_y), dim=1).view(-1, 2, 3)


_TABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": _brightness,
    "Contrast": _contrast,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
}
_GROUPS: tuple[tuple[tuple[str, ...], Callable[[Tensor, Tensor, Tensor], Tensor]], ...] = (
    (tuple(_TABLES), _look_up),
    (("Color",), _saturation),
    (("Sharpness",), _sharpness),
    (("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"), _warp),
)
