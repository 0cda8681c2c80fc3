"""Splits that keep the mix of classes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError

# Keeps these draws apart from those of the training order, which are seeded with (seed, epoch).
_STREAM = 0x5117_5117


def stratified_split(labels: Tensor, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(kept, picked): ascending int64 indices; `fraction` of every class, rounded, is picked at random.

    labels int64 [N]; 0 <= fraction < 1. A class of two or more images gives at least one to each side (when
    fraction > 0); the only image of a class is kept. A pure function. Raises ConfigError for the fraction.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"the fraction held out must be in [0, 1), not {fraction}")
    picked = torch.zeros(len(labels), dtype=torch.bool)
    rng = np.random.default_rng([seed, _STREAM])
    for members in _members(labels):
        n = len(members)
        count = min(max(round(fraction * n), 1), n - 1) if fraction > 0 else 0
        picked[members[torch.from_numpy(rng.permutation(n)[:count])]] = True
    return torch.where(~picked)[0], torch.where(picked)[0]


def stratified_sample(labels: Tensor, *, count: int, seed: int) -> Tensor:
    """`count` ascending int64 indices, of every class as many as its share gives (the largest remainders round up).

    labels int64 [N], 1 <= count <= N. A pure function.
    """
    rng = np.random.default_rng([seed, _STREAM + 1])
    members = _members(labels)
    shares = np.array([len(m) * count / len(labels) for m in members])
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: count - counts.sum()]] += 1
    chosen = [m[torch.from_numpy(rng.permutation(len(m))[:n])] for m, n in zip(members, counts, strict=True)]
    return torch.cat(chosen).sort().values


def _members(labels: Tensor) -> list[Tensor]:
    """Indices of each class that occurs, in class order."""
    order = torch.argsort(labels, stable=True)
    counts = torch.unique(labels, return_counts=True)[1]
    return list(order.split(counts.tolist()))
