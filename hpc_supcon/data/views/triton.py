"""Views of small images in one pass: crop, flip, color, gray, solarization, normalization, memory layout and dtype.

One program computes one view, all of it in registers: the source is read once per tap of the filter, the view
written once. Because the program has the whole view, the mean gray that contrast needs is a reduction inside it.
Same parameters and, up to rounding, same pixels as the torch path of views.py. Imported only when it is used;
under TRITON_INTERPRET=1 it runs on the CPU.
"""

# Triton reads the annotations of a kernel: its parameters cannot have Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sources.source import LUMA
from .pixels import copy_async

if TYPE_CHECKING:
    from .parameters import ViewParameters

_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in LUMA)


@triton.jit
def _gray(r, g, b, CHANNELS: tl.constexpr):
    if CHANNELS == 1:
        return r
    else:  # noqa: RET505 - a constexpr branch
        return r * _RED + g * _GREEN + b * _BLUE


@triton.jit
def _blend(x, factor, target):
    return tl.minimum(tl.maximum(x * factor + target, 0.0), 1.0)


@triton.jit
def _shifted_channel(hue, opposite, high, spread):
    """One channel after a shift of the hue; see color.adjust_hue."""
    away = hue + (2.5 - opposite)
    away = tl.abs((away - tl.floor(away)) * 6 - 3)
    return high - tl.minimum(tl.maximum(2 - away, 0.0), 1.0) * spread


@triton.jit
def _adjust_hue(r, g, b, turns):
    high, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    spread = high - low
    sixth = 1 / (tl.where(spread == 0, 1.0, spread) * 6)
    hue = tl.where(high == g, (b - r) * sixth + 2 / 6, (r - g) * sixth + 4 / 6)
    hue = tl.where(high == r, (g - b) * sixth, hue) + turns
    return (
        _shifted_channel(hue, 3 / 6, high, spread),
        _shifted_channel(hue, 5 / 6, high, spread),
        _shifted_channel(hue, 1 / 6, high, spread),
    )


@triton.jit
def _weight(tap, center, length, sharpness):
    """Weight of source pixels `tap` in target pixels at `center` (in source pixels); 0 outside the crop."""
    distance = tl.abs(center * sharpness - (tap + 0.5) * sharpness)
    return tl.where((tap >= 0) & (tap < length), tl.maximum(1 - distance, 0.0), 0.0)


@triton.jit
def _resample(
    image, top, left, height, width, y, x, inside, H, W, S: tl.constexpr, CHANNELS: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Target pixels (y, x) of the crop in 0..1, per channel; the triangle filter widens when shrinking."""
    step_y, step_x = height.to(tl.float32) / S, width.to(tl.float32) / S
    sharp_y, sharp_x = tl.minimum(1 / step_y, 1.0), tl.minimum(1 / step_x, 1.0)
    center_y, center_x = (y + 0.5) * step_y, (x + 0.5) * step_x
    first_y = tl.floor(center_y - 1 / sharp_y + 0.5).to(tl.int32)
    first_x = tl.floor(center_x - 1 / sharp_x + 0.5).to(tl.int32)
    r = tl.zeros([BLOCK], tl.float32)
    g = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(TAPS_Y):
        row = first_y + i
        weight_y = _weight(row, center_y, height, sharp_y)
        for j in range(TAPS_X):
            column = first_x + j
            weight = weight_y * _weight(column, center_x, width, sharp_x)
            source_y, source_x = top + row, left + column
            used = inside & (weight > 0)
            if PADDING == 1:
                used = used & (source_y >= 0) & (source_y < H) & (source_x >= 0) & (source_x < W)
            if PADDING == 2:
                source_y = (H - 1) - tl.abs((H - 1) - tl.abs(source_y))
                source_x = (W - 1) - tl.abs((W - 1) - tl.abs(source_x))
            pixel = image + source_y * W + source_x
            r += weight * tl.load(pixel, mask=used, other=0).to(tl.float32)
            if CHANNELS == 3:
                g += weight * tl.load(pixel + H * W, mask=used, other=0).to(tl.float32)
                b += weight * tl.load(pixel + 2 * H * W, mask=used, other=0).to(tl.float32)
            total += weight
    scale = 1 / (255 * tl.where(inside, total, 1.0))
    return r * scale, g * scale, b * scale


@triton.jit
def _views_kernel(
    images, boxes, factors, decisions, sequences, mean, std, out, H, W, V, stride_n, stride_c, stride_y, stride_x,
    S: tl.constexpr, CHANNELS: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """boxes int64 [n, 4]; factors fp32 [n, 4]; decisions uint8 [n]: 8 * row of sequences + 4 * solarized + 2 * gray +
    flip."""
    view = tl.program_id(0)
    box = boxes + view * 4
    decision = tl.load(decisions + view).to(tl.int32)
    sequence = sequences + (decision // 8) * 4
    p = tl.arange(0, BLOCK)
    inside = p < S * S
    y, x = p // S, p % S
    source_x = tl.where(decision % 2 != 0, S - 1 - x, x)
    image = images + (view // V).to(tl.int64) * CHANNELS * H * W
    r, g, b = _resample(
        image, tl.load(box).to(tl.int32), tl.load(box + 1).to(tl.int32), tl.load(box + 2).to(tl.int32),
        tl.load(box + 3).to(tl.int32), y, source_x, inside, H, W, S, CHANNELS, TAPS_Y, TAPS_X, PADDING, BLOCK,
    )  # fmt: skip
    for step in range(4):
        operation = tl.load(sequence + step).to(tl.int32)
        factor = tl.load(factors + view * 4 + tl.maximum(operation, 0))
        if operation == 3:
            if CHANNELS == 3:
                r, g, b = _adjust_hue(r, g, b, factor)
        elif operation >= 0:
            # Brightness blends with black, contrast with the mean gray, saturation with each pixel's gray.
            shade = _gray(r, g, b, CHANNELS)
            mean_shade = tl.sum(tl.where(inside, shade, 0.0)) / (S * S)
            target = tl.where(operation == 1, mean_shade, shade) * tl.where(operation == 0, 0.0, 1 - factor)
            r = _blend(r, factor, target)
            if CHANNELS == 3:
                g = _blend(g, factor, target)
                b = _blend(b, factor, target)
    if CHANNELS == 3:  # noqa: SIM102 - a constexpr; the next condition is not
        if decision // 2 % 2 != 0:
            r = _gray(r, g, b, CHANNELS)
            g = r
            b = r
    if decision // 4 % 2 != 0:
        r = tl.where(r < 0.5, r, 1 - r)
        g = tl.where(g < 0.5, g, 1 - g)
        b = tl.where(b < 0.5, b, 1 - b)
    target = out + view.to(tl.int64) * stride_n + y * stride_y + x * stride_x
    tl.store(target, (r - tl.load(mean)) / tl.load(std), mask=inside)
    if CHANNELS == 3:
        tl.store(target + stride_c, (g - tl.load(mean + 1)) / tl.load(std + 1), mask=inside)
        tl.store(target + 2 * stride_c, (b - tl.load(mean + 2)) / tl.load(std + 2), mask=inside)


def render(
    images: Tensor,
    parameters: ViewParameters,
    sequences: Tensor,
    mean: Tensor,
    std: Tensor,
    views: Tensor,
    *,
    outside: Literal["zeros", "reflect"] | None = None,
) -> None:
    """Write the views of uint8 images [B, C, H, W] to `views`, float32 or bfloat16 [n, C, S, S], n = B * V.

    views: of any strides. parameters: all but sigma and operations are used. sequences: int64 [k, 4], the operations
    of each permutation (Jitter.sequences), k <= 32. mean, std: float32 [C]. One program
    computes a block of S x S pixels: S <= 64. All but flip, permutation, grayscale and solarize are on the images'
    device. outside: what is around the images, where boxes are larger than them.
    """
    n, C, S, _ = views.shape
    B, _, H, W = images.shape
    # one byte for each view is copied to the device; permutation -1 is the last sequence
    decisions = parameters.permutation.remainder(len(sequences)).mul_(8)
    decisions.add_(parameters.solarize, alpha=4).add_(parameters.grayscale, alpha=2).add_(parameters.flip)
    _views_kernel[(n,)](
        images.contiguous(),
        parameters.boxes.contiguous(),
        parameters.factors,
        copy_async(decisions.to(torch.uint8), images.device),
        sequences,
        mean,
        std,
        views,
        H,
        W,
        n // B,
        *views.stride(),
        S=S,
        CHANNELS=C,
        TAPS_Y=_taps(H, S),
        TAPS_X=_taps(W, S),
        PADDING=(None, "zeros", "reflect").index(outside),
        BLOCK=triton.next_power_of_2(S * S),
        num_warps=4 if S <= 32 else 8,
        enable_fp_fusion=True,  # Triton 3.9 warns when it is left to the default
    )


def _taps(source: int, size: int) -> int:
    """Source pixels within the triangle filter of one target pixel, for any crop of `source` pixels."""
    return math.ceil(2 * max(1, source / size))
