"""Common corruptions of test images (Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019), at five severities, with the constants of the authors' code.

Images of up to SMALL pixels a side take the constants of CIFAR-10-C, larger ones those of ImageNet-C. Constants that
are lengths in proportion to the image (elastic_transform, pixelate) follow its size. Frost, which needs photographs,
and the extra corruption spatter are left out. Gray images have one channel of the same; saturate leaves them as they
are. Everything is computed in float64 on the CPU, and cut off to whole gray levels as the authors do; they then saved
ImageNet-C, but not CIFAR-10-C, as JPEG files, which is not done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..seeding import stream
from .corruption_filters import (
    coarse,
    compressed,
    convolve,
    disk,
    gaussian,
    motion,
    plasma,
    sample,
    shuffle,
    through_pillow,
    warp,
    zoom,
)
from .philox import FloatArray
from .sources.source import LUMA

SMALL = 64
"""Pixels: the longest side that takes the constants of CIFAR-10-C."""
SEVERITIES = (1, 2, 3, 4, 5)
_CHUNK = 2**18
"""Values that are computed at a time, by one thread: they fit into its cache."""

Generators = Iterator[np.random.Generator]
"""One for each image, in order; those that need none take none."""


@dataclass(frozen=True)
class Corruption:
    """One corruption: an entry of CORRUPTIONS."""

    apply: Callable[[FloatArray, Any, Generators], FloatArray]
    """apply(images [n, C, H, W] in 0..1, constant, generators) -> the same shape; the caller clips it to 0..1."""
    small: tuple[Any, ...]
    """The constant at each severity, of CIFAR-10-C."""
    large: tuple[Any, ...]
    """The same of ImageNet-C."""
    extra: bool = False
    """Not one of the 15 of the paper's mean, but one of those that it offers for validation."""


def corrupt(images: Tensor, name: str, severity: int, index: Tensor, *, seed: int = 0) -> Tensor:
    """uint8 [B, C, H, W], C 1 or 3 -> corrupted images of the same shape, on the same device.

    severity: 1..5. index: int64 [B], which images of the set these are. A corrupted image is a pure function of the
    image, (seed, name, severity, index) and nothing else. Raises ConfigError for an unknown name.
    """
    if name not in CORRUPTIONS:
        raise ConfigError(unknown_name("corruption", name, CORRUPTIONS))
    assert severity in SEVERITIES, severity
    assert images.dtype == torch.uint8, images.dtype
    pixels, numbers = images.cpu().numpy(), index.tolist()
    corruption, code = CORRUPTIONS[name], list(CORRUPTIONS).index(name)
    constant = (corruption.small if max(pixels.shape[2:]) <= SMALL else corruption.large)[severity - 1]
    out = np.empty_like(pixels)

    def fill(rows: slice) -> None:
        generators = (np.random.default_rng(stream(seed, "corruptions", code, severity, i)) for i in numbers[rows])
        levels = corruption.apply(pixels[rows] / 255, constant, generators) * 255
        # cut off, not rounded; the small number is for whole levels that come out a rounding error below
        out[rows] = np.clip(levels + 1e-6, 0, 255)

    size = max(1, _CHUNK // max(1, pixels[:1].size))
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        list(pool.map(fill, [slice(i, i + size) for i in range(0, len(pixels), size)]))
    return torch.from_numpy(out).to(images.device)


# ---- noise


def _gaussian_noise(x: FloatArray, std: float, generators: Generators) -> FloatArray:
    return x + np.stack([rng.normal(0, std, x.shape[1:]) for rng in generators])


def _shot_noise(x: FloatArray, photons: float, generators: Generators) -> FloatArray:
    """photons: expected number at a pixel of value 1."""
    return np.stack([rng.poisson(image * photons) for image, rng in zip(x, generators, strict=True)]) / photons


def _impulse_noise(x: FloatArray, share: float, generators: Generators) -> FloatArray:
    """share: of the values that become 0 or 1, each with the same probability."""
    chance = np.stack([rng.random(x.shape[1:]) for rng in generators])
    return np.where(chance < share / 2, 0.0, np.where(chance < share, 1.0, x))


def _speckle_noise(x: FloatArray, std: float, generators: Generators) -> FloatArray:
    return x + x * np.stack([rng.normal(0, std, x.shape[1:]) for rng in generators])


# ---- blur


def _gaussian_blur(x: FloatArray, sigma: float, _: Generators) -> FloatArray:
    return gaussian(x, sigma)


def _defocus_blur(x: FloatArray, constant: tuple[float, float], _: Generators) -> FloatArray:
    return convolve(x, disk(*constant))


def _glass_blur(x: FloatArray, constant: tuple[float, int, int], generators: Generators) -> FloatArray:
    """constant: standard deviation of a blur before and after, longest way of a pixel along an axis, repetitions.

    As in the published sets, a pixel takes its neighbor's value and the neighbor keeps it.
    """
    sigma, distance, repetitions = constant
    shape = (repetitions, 2, *x.shape[2:])
    offsets = np.stack([rng.integers(-distance, distance, shape) for rng in generators], axis=2)
    x = np.floor(gaussian(x, sigma) * 255 + 1e-6) / 255
    for offset in offsets:
        x = shuffle(x, distance, offset)
    return gaussian(x, sigma)


def _motion_blur(x: FloatArray, constant: tuple[float, float], generators: Generators) -> FloatArray:
    return motion(x, *constant, [rng.uniform(-45, 45) for rng in generators])


def _zoom_blur(x: FloatArray, constant: tuple[float, float], _: Generators) -> FloatArray:
    """constant: end (which the paper's code leaves out, but for rounding) and step of the factors, from 1."""
    factors = np.arange(1, *constant)
    total = np.sum([x, *(zoom(x, factor) for factor in factors.tolist())], axis=0)
    return total / (len(factors) + 1)


# ---- weather


def _fog(x: FloatArray, constant: tuple[float, float], generators: Generators) -> FloatArray:
    density, decay = constant
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    foggy = x + density * plasma((x.shape[2], x.shape[3]), decay, generators)
    return foggy * brightest / (brightest + density)


def _snow(x: FloatArray, constant: tuple[float, ...], generators: Generators) -> FloatArray:
    """constant: mean and standard deviation of the flakes, their zoom and threshold, radius and standard deviation
    of their motion blur, weight of the image against its whitened copy."""
    mean, std, factor, threshold, radius, sigma, weight = constant
    draws = [(rng.normal(mean, std, (1, *x.shape[2:])), rng.uniform(-135, -45)) for rng in generators]
    layer = zoom(np.stack([flakes for flakes, _ in draws]), factor)
    layer = np.floor(np.clip(np.where(layer < threshold, 0, layer), 0, 1) * 255) / 255
    layer = motion(layer, radius, sigma, [angle for _, angle in draws])
    gray = x if x.shape[1] == 1 else np.tensordot(x, LUMA, axes=(1, 0))[:, None]
    white = np.maximum(x, gray * 1.5 + 0.5)
    other = np.rot90(layer, 2, axes=(2, 3))
    return weight * x + (1 - weight) * white + layer + other


def _brightness(x: FloatArray, change: float, _: Generators) -> FloatArray:
    """Adds to the value of HSV; hue and saturation stay, so that all channels are scaled alike."""
    value = x.max(axis=1, keepdims=True)
    brighter = np.minimum(value + change, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


# ---- digital


def _contrast(x: FloatArray, factor: float, _: Generators) -> FloatArray:
    mean = x.mean(axis=(2, 3), keepdims=True)
    return (x - mean) * factor + mean


def _elastic_transform(x: FloatArray, constant: tuple[float, float, float], generators: Generators) -> FloatArray:
    """constant, in sides of the image: strength and smoothness of the displacements, longest way of the corners of
    a random affine map."""
    strength, sigma, shift = (value * min(x.shape[2:]) for value in constant)
    draws = [(rng.uniform(-shift, shift, (3, 2)), rng.uniform(-1, 1, (2, *x.shape[2:]))) for rng in generators]
    x = warp(x, np.stack([corners for corners, _ in draws]))
    if strength == 0:
        return x
    right, down = np.stack([gaussian(field, sigma, mode="reflect", truncate=3) for _, field in draws], 1) * strength
    row, column = np.mgrid[: x.shape[2], : x.shape[3]]
    return sample(x, row + down, column + right, mode="reflect")


def _pixelate(x: FloatArray, fraction: float, _: Generators) -> FloatArray:
    return through_pillow(x, coarse(fraction))


def _jpeg_compression(x: FloatArray, quality: int, _: Generators) -> FloatArray:
    return through_pillow(x, compressed(quality))


def _saturate(x: FloatArray, constant: tuple[float, float], _: Generators) -> FloatArray:
    """constant: factor and summand of the saturation of HSV; hue and value stay. Gray has the hue of red."""
    if x.shape[1] == 1:
        return x
    factor, summand = constant
    value = x.max(axis=1, keepdims=True)
    spread = value - x.min(axis=1, keepdims=True)
    distance = np.where(spread > 0, (value - x) / np.where(spread > 0, spread, 1), np.array([0, 1, 1])[:, None, None])
    saturation = np.clip(spread / np.where(value > 0, value, 1) * factor + summand, 0, 1)
    return value * (1 - saturation * distance)


_WIDE = 244 / 224  # the authors' slip of a key, in all published images
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.1), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": Corruption(_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": Corruption(
        _defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": Corruption(
        _glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": Corruption(
        _motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": Corruption(
        _zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": Corruption(
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "fog": Corruption(
        _fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": Corruption(
        _elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        tuple(
            (a * _WIDE, b * _WIDE, c * _WIDE)
            for a, b, c in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
        ),
    ),
    "pixelate": Corruption(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": Corruption(_jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "speckle_noise": Corruption(
        _speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6), extra=True
    ),
    "gaussian_blur": Corruption(_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6), extra=True),
    "saturate": Corruption(
        _saturate,
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        extra=True,
    ),
}
"""`probe.corruptions` -> the corruption. Append new names: the position is part of the derivation of its noise."""

BENCHMARK = tuple(name for name, corruption in CORRUPTIONS.items() if not corruption.extra)
"""Those of the paper's mean, without frost."""
