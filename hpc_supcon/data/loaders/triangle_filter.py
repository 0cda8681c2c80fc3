"""Pillow's bilinear resizing of a box of an image, compiled by numba: of three times Pillow's speed, without the GIL.

The filter is a triangle as wide as the distance of the output's pixels, or of the input's where that is larger
(antialiasing). As in Pillow (Resample.c), weights have 22 bits, rows are resized first and rounded, and pixels around
the box count for those at its edges. Imported where numba is there, which comes with FFCV.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_BITS = 22
_HALF = np.int32(1 << (_BITS - 1))
_U = numba.uint64  # numba looks for negative indices where they could be any
_compiled = numba.njit(nogil=True, error_model="numpy")

Array = Any  # numba compiles for the types that it is called with


@_compiled
def resample(pixels: Array, top: float, left: float, h: float, w: float, out: Array) -> None:
    """The box of `pixels` [H, W, 3] resized to out [S, S, 3], all uint8 and contiguous, here as below."""
    size = out.shape[0]
    columns, column_counts, column_weights = _filter(pixels.shape[1], left, w, size)
    lines, line_counts, line_weights = _filter(pixels.shape[0], top, h, size)
    first = lines[0]
    rows = np.empty((lines[size - 1] + line_counts[size - 1] - first, 3 * size), np.uint8)
    if column_weights.shape[1] == 3 and pixels.shape[1] > 1:
        _enlarge_rows(pixels, first, columns, column_weights, rows)
    else:
        _shrink_rows(pixels, first, columns, column_counts, column_weights, rows)
    _resize_columns(rows, first, lines, line_counts, line_weights, out)


@_compiled
def copy_box(pixels: Array, top: int, left: int, out: Array) -> None:
    """The box of the size of out [S, S, 3], as it is."""
    size, width = out.shape[0], pixels.shape[1]
    source, target = pixels.reshape(-1), out.reshape(-1)
    for y in range(size):
        begin = 3 * ((top + y) * width + left)
        target[3 * size * y : 3 * size * (y + 1)] = source[begin : begin + 3 * size]


@_compiled
def to_planes(pixels: Array, channels: int, out: Array) -> None:
    """The first `channels` of pixels [S, S, 3], one after the other, in out [channels * S * S]."""
    flat, n = pixels.reshape(-1), pixels.shape[0] * pixels.shape[1]
    for c in range(channels):
        plane = out[c * n : (c + 1) * n]
        for i in range(n):
            plane[i] = flat[_U(3 * i + c)]


@_compiled
def _filter(side: int, begin: float, extent: float, size: int) -> tuple[Array, Array, Array]:
    """For each of `size` outputs: its first input, how many it has, and their weights, int32 [size, taps]."""
    scale = extent / size
    support = max(scale, 1.0)
    per_pixel = 1.0 / support
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.zeros((size, int(np.ceil(support)) * 2 + 1), np.int32)
    for x in range(size):
        center = begin + (x + 0.5) * scale
        low, high = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), side)
        first[x], count[x] = low, high - low
        total = 0.0
        for i in range(low, high):
            total += max(1.0 - abs((i - center + 0.5) * per_pixel), 0.0)
        norm = 1.0 / total
        for i in range(low, high):
            share = max(1.0 - abs((i - center + 0.5) * per_pixel), 0.0) * norm
            weights[x, i - low] = int(0.5 + share * (1 << _BITS))
    return first, count, weights


@_compiled
def _enlarge_rows(pixels: Array, top: int, first: Array, weights: Array, rows: Array) -> None:
    """rows [n, 3 S] of the rows from `top` on of pixels [H, W > 1, 3], where an output has one or two inputs."""
    size, width, flat = len(first), pixels.shape[1], pixels.reshape(-1)
    offsets, a, b = np.empty(size, np.uint64), np.empty(size, np.int32), np.empty(size, np.int32)
    for x in range(size):
        low = min(first[x], width - 2)  # of the last pixel alone: the one before it with weight 0
        offsets[x] = 3 * low
        a[x], b[x] = (weights[x, 0], weights[x, 1]) if low == first[x] else (0, weights[x, 0])
    for y in range(len(rows)):
        row, base = rows[y], _U((top + y) * width * 3)
        for x in range(size):
            k, p = _U(3 * x), base + offsets[x]
            row[k] = (_HALF + a[x] * flat[p] + b[x] * flat[p + _U(3)]) >> _BITS
            row[k + _U(1)] = (_HALF + a[x] * flat[p + _U(1)] + b[x] * flat[p + _U(4)]) >> _BITS
            row[k + _U(2)] = (_HALF + a[x] * flat[p + _U(2)] + b[x] * flat[p + _U(5)]) >> _BITS


@_compiled
def _shrink_rows(pixels: Array, top: int, first: Array, count: Array, weights: Array, rows: Array) -> None:
    """As `_enlarge_rows`, for any number of inputs."""
    width, flat = pixels.shape[1], pixels.reshape(-1)
    for y in range(len(rows)):
        row, base = rows[y], _U((top + y) * width * 3)
        for x in range(len(first)):
            red, green, blue = _HALF, _HALF, _HALF
            k, p = _U(3 * x), base + _U(3 * first[x])
            for i in range(count[x]):
                weight = weights[x, i]
                red += weight * flat[p]
                green += weight * flat[p + _U(1)]
                blue += weight * flat[p + _U(2)]
                p += _U(3)
            row[k], row[k + _U(1)], row[k + _U(2)] = red >> _BITS, green >> _BITS, blue >> _BITS


@_compiled
def _resize_columns(rows: Array, top: int, first: Array, count: Array, weights: Array, out: Array) -> None:
    """out [S, S, 3] of rows [n, 3 S], of which the first one is row `top` of the image."""
    n = rows.shape[1]
    sums = np.empty(n, np.int32)
    for y in range(out.shape[0]):
        target, row, weight = out[y].reshape(n), rows[first[y] - top], weights[y, 0]
        if count[y] == 2:
            other, other_weight = rows[first[y] - top + 1], weights[y, 1]
            for x in range(n):
                target[x] = (_HALF + weight * row[x] + other_weight * other[x]) >> _BITS
            continue
        for x in range(n):
            sums[x] = _HALF + weight * row[x]
        for i in range(1, count[y]):
            row, weight = rows[first[y] - top + i], weights[y, i]
            for x in range(n):
                sums[x] += weight * row[x]
        for x in range(n):
            target[x] = sums[x] >> _BITS
