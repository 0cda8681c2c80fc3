"""Mean and standard deviation of a data set's pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from ..errors import CorruptSample
from .sources import ArraySource, Source, channel_statistics

NORMALISATION_SAMPLE = 10_000
"""Images whose statistics stand for all where a set is not held in memory."""


def normalisation_of(train: Source) -> dict[str, list[float]]:
    """Mean and standard deviation per channel of the training images, as plain numbers."""
    if isinstance(train, ArraySource):
        mean, std = channel_statistics(train.stack())
    else:
        n = min(len(train), NORMALISATION_SAMPLE)
        chosen = np.sort(np.random.default_rng(0).choice(len(train), n, replace=False)).tolist()
        mean, std = channel_statistics(torch.stack(list(_sound_images(train, chosen))))
    return {"mean": mean.tolist(), "std": std.tolist()}


def _sound_images(source: Source, indices: list[int]) -> Iterator[Tensor]:
    """Those that decode; what becomes of the others is the loader's business."""
    for i in indices:
        with suppress(CorruptSample):
            yield source.read(i)
