"""What all loaders have in common: batches, the steps of an epoch, options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

from torch import Tensor

from ...errors import ConfigError
from ..crop_boxes import check_crops
from ..levels import movable
from ..order import Order


@dataclass(frozen=True)
class Batch:
    """One rank's part of the global batch of one step, on the rank's device."""

    images: Tensor
    """uint8 [B, C, H, W], 0..255, or uint16 of 16-bit images; [B, V, C, S, S], of either memory layout, where the
    loader crops while decoding."""
    labels: Tensor
    """int64 [B], 0 <= label < number of classes."""
    index: Tensor
    """int64 [B]: which images of the source these are."""


LEFT_OUT = -1
"""In place of an image's index: it does not decode, and no other one is loaded in its place."""


def served(images: Tensor, labels: Tensor, loaded: Tensor) -> Batch:
    """The batch of `images` [B, ...], without those that were left out.

    labels: int64 [N], of the source. loaded: int64 [B], the index of each image, LEFT_OUT where there is none.
    """
    if (loaded == LEFT_OUT).any():
        valid = loaded != LEFT_OUT
        images, loaded = movable(images)[valid].view(images.dtype), loaded[valid]
    return Batch(images, labels[loaded], loaded)


def count_replaced(index: Tensor, loaded: Tensor) -> int:
    """How many of the images int64 [B] that were asked for were replaced by others."""
    return int(((loaded != index) & (loaded != LEFT_OUT)).sum())


class Loader(Protocol):
    """Loads the batches of one rank from one source in one order."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this rank in one epoch."""
        ...

    @property
    def replaced(self) -> int:
        """Images that did not decode and were replaced by others so far, on this rank."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of that epoch, from step `start` on (where a resumed run continues).

        One epoch at a time: asking for another one ends the one before. The tensors of a batch are new ones,
        which a caller may keep and change. Where corrupt images are left out, batches are shorter by them, also
        empty. Raises CorruptSample, and LoaderDied after the timeout.
        """
        ...

    def close(self) -> None:
        """Free memory and end threads and processes; the loader yields nothing afterwards."""
        ...


BatchRequest = tuple[int, Tensor]
"""(epoch, index int64 [B] on the CPU): the images of one batch."""


class EpochSteps:
    """One rank's steps in every epoch of an order. Raises ConfigError where the order does not fit the ranks."""

    def __init__(self, order: Order, seed: int, rank: int, world_size: int) -> None:
        self._order, self.seed, self._rank, self._world_size = order, seed, rank, world_size
        self._steps = order.steps(rank, world_size)
        self._epochs_started = 0

    def __len__(self) -> int:
        return self._steps

    @property
    def largest_batch(self) -> int:
        """Images; the same in every epoch."""
        return max((len(index) for _, index in self.requests(0, 0)), default=0)

    def requests(self, epoch: int, start: int) -> list[BatchRequest]:
        """The batches from step `start` on. Raises ValueError for a step that does not exist."""
        if not 0 <= start <= self._steps:
            raise ValueError(f"step {start} is not in an epoch of {self._steps} steps")
        batches = list(self._order.epoch(self.seed, epoch, self._rank, self._world_size))
        return [(epoch, index) for index in batches[start:]]

    def start_epoch(self) -> int:
        """End the epoch in progress; returns the number of the new one for `is_current`."""
        self._epochs_started += 1
        return self._epochs_started

    def is_current(self, number: int) -> bool:
        """Whether no other epoch was started since."""
        return number == self._epochs_started


OnCorrupt = Literal["fail", "replace", "leave_out"]


@dataclass(frozen=True)
class CropOptions:
    """Random resized crops, taken from the image as it is stored, while it is decoded.

    A loader with these options yields uint8 or uint16 [B, views, C, image_size, image_size]. scale: range of the
    crop's share of the area; ratio: range of its width / height. Raises ConfigError for values outside their ranges.
    """

    views: int
    image_size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        check_crops(self.views, self.image_size, self.scale, self.ratio)


@dataclass(frozen=True)
class LoaderOptions:
    """workers: processes or threads that decode, per rank; the resident loader uses none after it has started.

    timeout_s: longest wait for one batch, in seconds, before LoaderDied. on_corrupt: what happens to an image
    that does not decode: `fail` raises CorruptSample, `replace` loads another one in its place, `leave_out` loads
    none. Whether an image decodes is what its source says, with Pillow, whatever the loader decodes with.
    """

    workers: int = 2
    timeout_s: float = 120.0
    on_corrupt: OnCorrupt = "fail"
    crop: CropOptions | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"data.workers must be at least 1, not {self.workers}")
        if not self.timeout_s > 0:
            raise ConfigError(f"data.timeout_s must be above 0 seconds, not {self.timeout_s}")
        if self.on_corrupt not in get_args(OnCorrupt):
            raise ConfigError(f"data.on_corrupt must be fail or replace, not {self.on_corrupt!r}")

    def for_evaluation(self) -> LoaderOptions:
        """The same without random crops; a corrupt image is left out, because another one in its place would be
        scored twice."""
        on_corrupt: OnCorrupt = "fail" if self.on_corrupt == "fail" else "leave_out"
        return replace(self, crop=None, on_corrupt=on_corrupt)
