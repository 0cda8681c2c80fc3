"""Which images each rank sees at each step: pure functions of (seed, epoch, rank, world_size).

No state and no communication, so that a resumed run, another loader or another number of ranks gets the same
global batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..seeding import stream


class Order(Protocol):
    """The order in which a loader goes through a source."""

    @property
    def n(self) -> int:
        """Number of images in the source."""
        ...

    def epoch(self, seed: int, epoch: int, rank: int, world_size: int) -> Tensor | list[Tensor]:
        """One int64 tensor of source indices per step of this rank."""
        ...

    def steps(self, rank: int, world_size: int) -> int:
        """The number of steps of this rank in one epoch."""
        ...


def check_batch_size(batch_size: int, n: int) -> None:
    """Raise ConfigError when batch_size < 1, DataError when `n` images are fewer than one batch."""
    if batch_size < 1:
        raise ConfigError(f"data.batch_size must be at least 1, not {batch_size}")
    if n < batch_size:
        raise DataError(
            f"the training set has {n} images, fewer than one batch of data.batch_size={batch_size}: "
            f"set data.batch_size to at most {n}"
        )


def check_ranks_divide(batch_size: int, rank: int, world_size: int) -> None:
    """Raise ConfigError when the global batch cannot be divided equally among the ranks."""
    assert 0 <= rank < world_size
    if batch_size % world_size:
        below = batch_size // world_size * world_size
        valid = f"{below} or {below + world_size}" if below else f"{world_size}"
        raise ConfigError(
            f"data.batch_size={batch_size} is the global batch and cannot be divided equally among "
            f"{world_size} ranks: use {valid}"
        )


def training_steps(n: int, batch_size: int, rank: int, world_size: int) -> int:
    """Steps per epoch, the same on every rank; an incomplete last batch is dropped. Raises ConfigError."""
    check_ranks_divide(batch_size, rank, world_size)
    return n // batch_size


def rank_part(batches: Tensor, rank: int, world_size: int) -> Tensor:
    """This rank's part [steps, batch_size // world_size] of global batches [steps, batch_size]."""
    return batches.unflatten(1, (world_size, -1))[:, rank].contiguous()


@dataclass(frozen=True)
class TrainOrder:
    """A new permutation of all `n` images every epoch, cut into GLOBAL batches of `batch_size` images.

    The incomplete last batch is dropped: padding it would duplicate images, and a duplicate is a trivial
    positive. Each epoch drops other images, so none is left out of training.

    Raises DataError when there are fewer images than one batch, ConfigError when batch_size < 1.
    """

    n: int
    batch_size: int

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, self.n)

    def steps(self, rank: int, world_size: int) -> int:
        """Steps per epoch: the same on every rank. Raises ConfigError as `epoch` does."""
        return training_steps(self.n, self.batch_size, rank, world_size)

    def epoch(self, seed: int, epoch: int, rank: int, world_size: int) -> Tensor:
        """int64 [steps, batch_size // world_size]: row k is this rank's part of global batch k.

        The parts of all ranks, concatenated in rank order, are the global batch, the same for any number of ranks.
        `seed`, `epoch` >= 0. Raises ConfigError when the global batch cannot be divided equally.
        """
        steps = self.steps(rank, world_size)
        # PCG64 seeded through SeedSequence, and Generator.permutation, are specified by NumPy;
        # torch.randperm is not promised to stay the same between releases.
        permutation = np.random.default_rng(stream(seed, "order", epoch)).permutation(self.n)
        batches = torch.from_numpy(permutation[: steps * self.batch_size]).view(steps, self.batch_size)
        return rank_part(batches, rank, world_size)


@dataclass(frozen=True)
class EvalOrder:
    """Every one of `n` images exactly once over all ranks, in the source's order.

    A rank gets a contiguous range, in batches of `batch_size` images; the last batch may be shorter, and with
    fewer images than ranks some ranks get none. The ranges of all ranks, in rank order, concatenate to 0..n-1.
    """

    n: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"the evaluation batch size must be at least 1, not {self.batch_size}")

    def rank_range(self, rank: int, world_size: int) -> tuple[int, int]:
        """First index of this rank, and one past its last."""
        assert 0 <= rank < world_size
        return self.n * rank // world_size, self.n * (rank + 1) // world_size

    def steps(self, rank: int, world_size: int) -> int:
        """Batches of this rank; ranks may differ by one, so no collective may be called for each batch."""
        first, last = self.rank_range(rank, world_size)
        return -(-(last - first) // self.batch_size)

    def epoch(self, seed: int, epoch: int, rank: int, world_size: int) -> list[Tensor]:
        """int64 [<= batch_size] per step. `seed` and `epoch` have no effect: evaluation is not shuffled."""
        first, last = self.rank_range(rank, world_size)
        return [torch.arange(i, min(i + self.batch_size, last)) for i in range(first, last, self.batch_size)]
