"""What sources have in common whose images are decoded whenever they are read."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ...errors import DataError
from .bands import Picture, Pixels
from .source import channels_first, resize_and_crop


class DecodedSource(ABC):
    """A Source of which a subclass has `pil_image` and `subset`."""

    paths: tuple[Path, ...] | None = None

    def __init__(
        self,
        labels: Tensor,
        classes: Sequence[str],
        channels: int,
        image_size: int,
        dtype: torch.dtype = torch.uint8,
    ) -> None:
        """labels int64 [N] in 0..len(classes)-1, zeros where there are no classes; dtype: uint8 or uint16."""
        assert labels.dtype == torch.int64
        self.labels, self.classes = labels, tuple(classes)
        self.channels, self.image_size, self.dtype = channels, image_size, dtype

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def pil_image(self, i: int) -> Picture:
        """See Source.pil_image."""

    def read(self, i: int) -> Tensor:
        """uint8 or uint16 [C, S, S]. Raises as `pil_image`."""
        return torch.from_numpy(self._decode(i).copy())  # Pillow's own memory is read-only

    def stack(self) -> Tensor:
        """uint8 or uint16 [N, C, S, S], read by one thread for each processor of this process.

        Raises what `read` raises, for the first image that fails.
        """
        n = len(self)
        images = torch.empty((n, self.channels, self.image_size, self.image_size), dtype=self.dtype).numpy()
        failed = threading.Event()

        def decode(start: int) -> None:
            for i in range(start, min(start + 256, n)):
                if failed.is_set():
                    return
                try:
                    images[i] = self._decode(i)
                except DataError:
                    failed.set()
                    raise

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for _ in pool.map(decode, range(0, n, 256)):
                pass
        return torch.from_numpy(images)

    def _decode(self, i: int) -> Pixels:
        """[C, S, S]."""
        return channels_first(resize_and_crop(self.pil_image(i), self.image_size))
