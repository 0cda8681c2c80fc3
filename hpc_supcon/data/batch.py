"""What every loader serves, and what every loader is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's share of one step, on the rank's device."""

    images: Tensor
    """uint8 [B, C, H, W], 0..255; [B, V, C, S, S], of either memory layout, where the loader crops while decoding."""
    labels: Tensor
    """int64 [B], 0 <= label < number of classes."""
    index: Tensor
    """int64 [B]: which images of the source these are."""


class Loader(Protocol):
    """Serves one source in one order to one rank."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches this rank gets in one epoch."""
        ...

    @property
    def replaced(self) -> int:
        """Images that did not decode and were served as others so far, on this rank."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of that epoch, from step `start` on (where a resumed run goes on).

        One epoch at a time: asking for another one ends the one before. The tensors of a batch are new ones,
        which a caller may keep and change. Raises CorruptSample, and LoaderDied after the time-out.
        """
        ...

    def close(self) -> None:
        """Give back memory, threads and processes; the loader serves nothing afterwards."""
        ...
