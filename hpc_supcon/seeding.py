"""Named random streams: independent of each other, all derived from the one seed of a run.

    generator = torch.Generator().manual_seed(stream(seed, "views", rank, step))
    rng = np.random.default_rng(stream(seed, "order", epoch))

A stream is a pure function of its seed, name and indices, so draws from one never change another. Training asks for
the streams of each step, so a resumed run needs no saved generator states.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch

VERSION = 2
"""Grows when the numbers of any stream change. Runs of version 0.1 did not record one."""

STREAMS = (
    "model",  # initial weights
    "order",  # of the training images: epoch
    "split",  # images of train that become the validation split
    "subset",  # data.train_images of train
    "statistics",  # images whose mean and standard deviation stand for the whole data set
    "synthetic",  # images of data.source=synthetic: 0 class patterns, 1 train, 2 test
    "crops",  # random crops taken by the loaders, and what replaces corrupt images
    "views",  # random views in training: rank, step
    "layers",  # dropout, random triplets and all else that uses the global generators in training: rank, step
    "validation",  # views and triplets of the validation loss: rank
    "probe",  # initial weights and batches of a classifier
    "finetune",  # dropout while an encoder and its classifier are trained: rank
    "finetune views",  # random views for the same: rank
    "corruptions",  # corrupted test images: corruption, severity, image
    "bootstrap",  # resampled images of confidence intervals
    "clusters",  # initial centers of k-means: restart
    "maps",  # the images of the maps of embeddings, and how these are fitted: 0 sample, 1 queries, 2 fit, 3 drawing
    "prune",  # random scores, and batches of the gradients that scores are made of: rank
    "inverse Fisher",  # of pruning: 0 directions, 1-6 targets; fit or batch, step, for targets also rank
    "loss",  # the first keys of a queue, prototypes
)
"""Every name, with the meaning of its indices. Append new names: the position is part of the derivation."""


@lru_cache(maxsize=1024)
def stream(seed: int, name: str, *indices: int) -> int:
    """The seed of one stream, in 0 <= result < 2^63, for any generator of NumPy or PyTorch.

    seed, indices: >= 0. Streams that differ in seed, name or indices (also in their number) are independent: NumPy's
    SeedSequence hashes all of them.
    """
    entropy = [seed % 2**64, seed >> 64, STREAMS.index(name), len(indices), *indices]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_global_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (on all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def changed_since(state: Mapping[str, Any]) -> str | None:
    """One line for the user when the run that saved `state` drew from other streams than this version, else None."""
    if state.get("random_streams") == VERSION:
        return None
    return (
        "saved by an earlier version, whose random numbers differ: the validation split that it carved off train, "
        "orders and views are drawn anew"
    )
