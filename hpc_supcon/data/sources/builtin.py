"""Data sets without files: scikit-learn's digits, and synthetic images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError
from ...seeding import stream
from ..levels import MAX_CHANNELS, dtype_of, full_scale, rounded_
from .source import ArraySource
from .stratify import stratified_split


def digits() -> tuple[ArraySource, ArraySource]:
    """(train, test) of the 1,797 8x8 gray digits in scikit-learn; test is a fixed, stratified fifth.

    The test set does not depend on any seed of a run, so that results of different runs can be compared.
    """
    from sklearn.datasets import load_digits  # half a second to import

    data = load_digits()
    images = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    source = ArraySource(images, torch.from_numpy(data.target.astype(np.int64)), tuple("0123456789"))
    rest, test = stratified_split(source.labels, fraction=0.2, seed=0)
    return source.subset(rest), source.subset(test)


def synthetic(
    *,
    images: int = 1024,
    classes: int = 10,
    channels: int = 3,
    image_size: int = 32,
    bits: int = 8,
    seed: int = 0,
) -> tuple[ArraySource, ArraySource]:
    """(train, test) of `images` and max(images // 4, classes) random images whose classes a network can learn.

    A class is a smooth random pattern; each image is that pattern rolled by up to a quarter of its size, plus a
    smooth pattern of the image alone, at a random contrast, plus pixel noise. The mean color is
    independent of the class. channels: 1..64. bits: 8 or 16, the same images in finer levels. A pure function of the
    arguments. Raises ConfigError for values outside their ranges.
    """
    if classes < 1 or images < classes or image_size < 1 or not 1 <= channels <= MAX_CHANNELS or bits not in (8, 16):
        raise ConfigError(
            f"synthetic data needs images >= classes >= 1, image_size >= 1, channels 1..{MAX_CHANNELS} and bits 8 or "
            f"16; got images={images}, classes={classes}, image_size={image_size}, channels={channels}, bits={bits}"
        )
    dtype = dtype_of(bits)
    rng = np.random.default_rng(stream(seed, "synthetic", 0))
    patterns = _smooth(rng, classes, channels, image_size)
    names = [f"class-{c}" for c in range(classes)]

    def split(count: int, index: int) -> ArraySource:
        rng = np.random.default_rng(stream(seed, "synthetic", index))
        labels = torch.from_numpy(rng.permutation(np.arange(count, dtype=np.int64) % classes))
        pieces = [_images_of(patterns, chunk, rng, dtype) for chunk in labels.split(2048)]
        return ArraySource(torch.cat(pieces), labels, names)

    return split(images, 1), split(max(images // 4, classes), 2)


def _images_of(patterns: Tensor, labels: Tensor, rng: np.random.Generator, dtype: torch.dtype) -> Tensor:
    """`dtype` [n, C, S, S]: one image for each label."""
    n, (_, channels, size, _) = len(labels), patterns.shape
    max_shift = size // 4
    shift = torch.from_numpy(rng.integers(-max_shift, max_shift + 1, (2, n, 1)))
    rows, columns = ((torch.arange(size) - s) % size for s in shift)
    rolled = patterns[labels[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    contrast = torch.from_numpy(rng.uniform(0.5, 1.0, (n, 1, 1, 1)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal((n, channels, size, size), dtype=np.float32))
    values = 0.5 + 0.18 * contrast * (rolled + _smooth(rng, n, channels, size) + 0.5 * noise)
    return rounded_(values * full_scale(dtype), dtype)


def _smooth(rng: np.random.Generator, n: int, channels: int, size: int) -> Tensor:
    """float32 [n, C, S, S]: random fields of mean 0, interpolated from 5 x 5 values."""
    coarse = torch.from_numpy(rng.standard_normal((n, channels, 5, 5), dtype=np.float32))
    fields = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return fields - fields.mean(dim=(2, 3), keepdim=True)
