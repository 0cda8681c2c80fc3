"""What a loader has to serve, and which epoch it is serving."""

from __future__ import annotations

from torch import Tensor

from ..order import Order

Task = tuple[int, Tensor]
"""(epoch, int64 [B] on the CPU): one batch."""


class Steps:
    """One rank's batches of every epoch of an order. Raises ConfigError where the order does not fit the ranks."""

    def __init__(self, order: Order, seed: int, rank: int, world_size: int) -> None:
        self._order, self.seed, self._rank, self._world_size = order, seed, rank, world_size
        self._steps = order.steps(rank, world_size)
        self._begun = 0

    def __len__(self) -> int:
        return self._steps

    @property
    def largest_batch(self) -> int:
        """Images; the same in every epoch."""
        return max((len(index) for _, index in self.of(0, 0)), default=0)

    def of(self, epoch: int, start: int) -> list[Task]:
        """The batches from step `start` on. Raises ValueError for a step that does not exist."""
        if not 0 <= start <= self._steps:
            raise ValueError(f"step {start} is not in an epoch of {self._steps} steps")
        return [
            (epoch, index)
            for index in list(self._order.epoch(self.seed, epoch, self._rank, self._world_size))[start:]
        ]

    def begin(self) -> int:
        """A ticket for the epoch that begins; all earlier ones are over."""
        self._begun += 1
        return self._begun

    def is_current(self, ticket: int) -> bool:
        return ticket == self._begun
