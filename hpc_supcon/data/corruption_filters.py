"""Filters and random fields of the common corruptions: float64 images [n, C, H, W] in 0..1, any size, one by one.

What is computed for an image does not depend on the others of its batch, so that a corrupted image is the same in
every batch and on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image

from .philox import FloatArray, IntArray
from .sources.source import channels_first


def gaussian(x: FloatArray, sigma: float, *, mode: str = "nearest", truncate: float = 4.0) -> FloatArray:
    """x [..., H, W] filtered as by scipy.ndimage.gaussian_filter along its last two axes; sigma 0 changes nothing."""
    if sigma == 0:
        return x
    rows, columns = (_gaussian_matrix(size, sigma, mode, truncate) for size in x.shape[-2:])
    return rows @ x @ columns.T


@lru_cache(maxsize=64)
def _gaussian_matrix(size: int, sigma: float, mode: str, truncate: float) -> FloatArray:
    """[size, size]: the filter of one axis, as a matrix: faster where it is wider than the image."""
    from scipy.ndimage import gaussian_filter1d

    return gaussian_filter1d(np.eye(size), sigma, axis=0, mode=mode, truncate=truncate)


@lru_cache(maxsize=16)
def disk(radius: float, sigma: float) -> FloatArray:
    """[K, K], K odd: a disk of this radius in pixels and of sum 1, smoothed by a small Gaussian.

    As in the published sets, the smoothing is mirrored at the edges of the array: it adds 1 % where the disk
    reaches them (a radius of 8 or 10).
    """
    from scipy.ndimage import convolve1d

    reach, half = (8, 1) if radius <= 8 else (math.ceil(radius), 2)
    offset = np.arange(-reach, reach + 1)
    kernel = np.where(offset**2 + offset[:, None] ** 2 <= radius**2, 1.0, 0.0)
    kernel /= kernel.sum()
    weights = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    for axis in (0, 1):
        kernel = convolve1d(kernel, weights / weights.sum(), axis=axis, mode="mirror")
    used = offset[(kernel > 1e-12).any(axis=0)]
    inner = slice(reach + used[0], reach + used[-1] + 1)
    return kernel[inner, inner]


def convolve(x: FloatArray, kernel: FloatArray) -> FloatArray:
    """x [n, C, H, W] convolved with a kernel [K, K]; mirrored at the edges, whose pixels are not repeated."""
    from scipy.signal import fftconvolve

    reach = len(kernel) // 2
    padded = np.pad(x, [(0, 0), (0, 0), (reach, reach), (reach, reach)], mode="reflect")
    return fftconvolve(padded, kernel[None, None], mode="valid", axes=(2, 3))


def motion(x: FloatArray, radius: float, sigma: float, angles: Iterable[float]) -> FloatArray:
    """x [n, C, H, W] blurred along a line from each pixel, at an angle in degrees for each image, as by ImageMagick.

    The weights are one half of a Gaussian over 2 * radius + 1 pixels; pixels outside have the value of the edge.
    Cut off to whole gray levels, as ImageMagick's result is.
    """
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    weights /= weights.sum()
    steps = steps[weights > 1e-9]
    reach = len(steps)
    padded = np.pad(x, [(0, 0), (0, 0), (reach, reach), (reach, reach)], mode="edge")
    height, width = x.shape[2:]
    blurred = np.zeros_like(x)
    for image, target, angle in zip(padded, blurred, angles, strict=True):
        radians = math.radians(angle)
        tops = np.ceil(steps * math.sin(radians) - 0.5).astype(int) + reach
        lefts = np.ceil(steps * math.cos(radians) - 0.5).astype(int) + reach
        for top, left, weight in zip(tops.tolist(), lefts.tolist(), weights.tolist(), strict=False):
            target += weight * image[:, top : top + height, left : left + width]
    return np.floor(blurred * 255 + 1e-6) / 255


def zoom(x: FloatArray, factor: float) -> FloatArray:
    """The center of x [..., H, W], enlarged to the same size by a factor of at least 1, linearly."""
    for axis in (-2, -1):
        size = x.shape[axis]
        kept = math.ceil(size / factor)
        enlarged = round(kept * factor)
        first = (enlarged - size) // 2
        position = np.arange(first, first + size) * ((kept - 1) / max(enlarged - 1, 1))
        low = np.minimum(position.astype(int), kept - 1)
        high = np.minimum(low + 1, kept - 1)
        share = position - low if axis == -1 else (position - low)[:, None]
        top = (size - kept) // 2
        x = x.take(top + low, axis) * (1 - share) + x.take(top + high, axis) * share
    return x


def shuffle(x: FloatArray, distance: int, offsets: IntArray) -> FloatArray:
    """Each pixel of x [n, C, H, W] takes the value of a neighbor up to `distance` away; the border stays.

    offsets: int64 [2, n, H, W], down and right. From the last pixel to the first, so that a neighbor that was
    visited before passes on the value that it has taken.
    """
    n, channels, height, width = x.shape
    row, column = np.mgrid[:height, :width]
    moved = (row > distance) & (row <= height - distance) & (column > distance) & (column <= width - distance)
    here = row * width + column
    neighbor = np.where(moved, here + offsets[0] * width + offsets[1], here).reshape(n, -1)
    visited = moved.reshape(-1)[neighbor] & (neighbor > here.reshape(-1))
    # two entries for each pixel: its first value (its own index) and its last one (the index + pixels)
    pixels = height * width
    first = np.broadcast_to(np.arange(pixels), (n, pixels))
    origin = np.concatenate([first, neighbor + visited * pixels], axis=1)
    while not np.array_equal(further := np.take_along_axis(origin, origin, axis=1), origin):
        origin = further
    values = np.take_along_axis(x.reshape(n, channels, pixels), origin[:, None, pixels:], axis=2)
    return values.reshape(x.shape)


def plasma(shape: tuple[int, int], decay: float, generators: Iterable[np.random.Generator]) -> FloatArray:
    """[n, 1, H, W] in 0..1: a cloud for each generator, by the diamond-square algorithm.

    Of a square whose side is a power of two and which wraps around. The random part of a point is divided by
    decay^2 when the distance of the points is halved.
    """
    size = max(2, 2 ** math.ceil(math.log2(max(shape))))
    draws = np.stack([rng.uniform(-1, 1, size * size - 1) for rng in generators])
    field = np.zeros((len(draws), size, size))
    step, strength = size, 100.0**2

    def fill(target: FloatArray, mean: FloatArray) -> None:
        nonlocal draws
        count = mean[0].size
        target[:] = mean + strength * draws[:, :count].reshape(mean.shape)
        draws = draws[:, count:]

    def below(values: FloatArray, axis: int, shift: int) -> FloatArray:
        return values + np.roll(values, shift, axis=axis)

    while step > 1:
        half = step // 2
        corners, centers = field[:, ::step, ::step], field[:, half::step, half::step]
        fill(centers, below(below(corners, 1, -1), 2, -1) / 4)
        fill(field[:, ::step, half::step], (below(centers, 1, 1) + below(corners, 2, -1)) / 4)
        fill(field[:, half::step, ::step], (below(centers, 2, 1) + below(corners, 1, -1)) / 4)
        step, strength = half, strength / decay**2
    field -= field.min(axis=(1, 2), keepdims=True)
    return (field / field.max(axis=(1, 2), keepdims=True))[:, None, : shape[0], : shape[1]]


def warp(x: FloatArray, corners: FloatArray) -> FloatArray:
    """x [n, C, H, W] under the affine map that moves three corners of its central square by `corners` [n, 3, 2]
    pixels (right, down); linear, mirrored at the edges, whose pixels are not repeated."""
    height, width = x.shape[2:]
    side = max(1, min(height, width) // 3)
    square = np.array([[1, 1], [1, -1], [-1, -1]]) * side + np.array([width // 2, height // 2])
    moved = np.concatenate([square + corners, np.ones((len(x), 3, 1))], axis=2)
    inverse = np.linalg.solve(moved, np.broadcast_to(square.astype(np.float64), corners.shape))
    row, column = np.mgrid[:height, :width].astype(np.float64)
    position = np.stack([column, row, np.ones_like(row)], axis=-1) @ inverse[:, None]
    return sample(x, position[..., 1], position[..., 0], mode="mirror")


def sample(x: FloatArray, rows: FloatArray, columns: FloatArray, *, mode: str) -> FloatArray:
    """x [n, C, H, W] at fractional positions [n, H, W], linearly; outside as scipy.ndimage's `mode` says."""
    from scipy.ndimage import map_coordinates

    out = np.empty_like(x)
    for image, target, position in zip(x, out, np.stack([rows, columns], axis=1), strict=True):
        for channel, filled in zip(image, target, strict=True):
            map_coordinates(channel, position, output=filled, order=1, mode=mode)
    return out


def through_pillow(x: FloatArray, change: Callable[[Image.Image], Image.Image]) -> FloatArray:
    """`change` of each image, as gray or RGB of 8 bits."""
    levels = np.rint(x * 255).astype(np.uint8)
    images = (Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)) for image in levels)
    return np.stack([channels_first(change(image)) for image in images]) / 255


def compressed(quality: int) -> Callable[[Image.Image], Image.Image]:
    """An image as it comes back from a JPEG file of this quality."""

    def change(image: Image.Image) -> Image.Image:
        file = BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return change


def coarse(fraction: float) -> Callable[[Image.Image], Image.Image]:
    """An image that was made smaller, to this fraction of its sides, and enlarged again, both by box filters."""

    def change(image: Image.Image) -> Image.Image:
        small = (max(1, int(image.width * fraction)), max(1, int(image.height * fraction)))
        return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)

    return change
