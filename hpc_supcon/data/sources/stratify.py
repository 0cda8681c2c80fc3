"""Random splits and samples that preserve the proportions of the classes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...seeding import stream


def stratified_split(labels: Tensor, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(kept, picked): ascending int64 indices; `fraction` of every class, rounded, is picked at random.

    labels int64 [N]; 0 <= fraction < 1. A class of two or more images has at least one on each side (when
    fraction > 0); the only image of a class is kept. A pure function.
    """
    assert 0 <= fraction < 1, fraction
    picked = torch.zeros(len(labels), dtype=torch.bool)
    rng = np.random.default_rng(stream(seed, "split"))
    for members in indices_by_class(labels):
        n = len(members)
        count = min(max(round(fraction * n), 1), n - 1) if fraction > 0 else 0
        picked[members[torch.from_numpy(rng.permutation(n)[:count])]] = True
    return torch.where(~picked)[0], torch.where(picked)[0]


def stratified_sample(labels: Tensor, *, count: int, seed: int) -> Tensor:
    """`count` ascending int64 indices, of every class in proportion to its size (the largest remainders round up).

    labels int64 [N], 1 <= count <= N. A pure function.
    """
    rng = np.random.default_rng(stream(seed, "subset"))
    members = indices_by_class(labels)
    shares = np.array([len(m) * count / len(labels) for m in members])
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: count - counts.sum()]] += 1
    chosen = [m[torch.from_numpy(rng.permutation(len(m))[:n])] for m, n in zip(members, counts, strict=True)]
    return torch.cat(chosen).sort().values


def indices_by_class(labels: Tensor) -> list[Tensor]:
    """int64 indices of the images of each class that has any, in ascending order of the labels."""
    counts = torch.bincount(labels)
    return list(labels.argsort(stable=True).split(counts[counts > 0].tolist()))
