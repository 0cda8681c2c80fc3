"""Samples by index, one after the other: what worker processes do, and what every loader does with damage."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...errors import CorruptSample
from ..sources.source import Source
from .base import CropOptions, OnCorrupt
from .crops import crop_boxes, replacement

ATTEMPTS = 100
"""Images tried in the place of a corrupt one before the whole set is taken for broken."""

Pixels = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]


@dataclass
class SampleReader:
    """Images of a source in the shape that batches have: [C, S, S], or [V, C, S, S] with crops.

    `replaced` counts the images that another one was served for.
    """

    source: Source
    seed: int
    crop: CropOptions | None
    on_corrupt: OnCorrupt
    replaced: int = field(default=0, init=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        if self.crop is None:
            return self.source.channels, self.source.image_size, self.source.image_size
        return self.crop.views, self.source.channels, self.crop.image_size, self.crop.image_size

    def fill(self, out: Pixels, epoch: int, index: Indices) -> Indices:
        """Write the images of index int64 [B] into out [B, ...]; the indices of those that were written.

        Raises CorruptSample naming path and index, DataError where an image is not of the set's form.
        """
        return np.array([self.into(out[k], epoch, i) for k, i in enumerate(index.tolist())], dtype=np.int64)

    def into(self, out: Pixels, epoch: int, i: int) -> int:
        """Write sample i, or what replaces it, into `out`; the index of the one that was written."""
        try:
            self._read(out, epoch, i)
            return i
        except CorruptSample as error:
            if self.on_corrupt == "fail":
                raise CorruptSample(f"{error} (image {i} of the set)") from error
            return self.replace(out, epoch, i)

    def replace(self, out: Pixels, epoch: int, i: int) -> int:
        """Write a sound sample in the place of corrupt sample i; its index, a pure function of (seed, epoch, i)."""
        for attempt in range(ATTEMPTS):
            j = replacement(self.seed, epoch, i, attempt, len(self.source))
            try:
                self._read(out, epoch, j)
            except CorruptSample:
                continue
            self.replaced += 1
            return j
        raise CorruptSample(f"image {i} does not decode, and neither do {ATTEMPTS} others tried in its place")

    def _read(self, out: Pixels, epoch: int, i: int) -> None:
        if self.crop is None:
            out[:] = self.source.read(i).numpy()
            return
        picture, size = self.source.picture(i), (self.crop.image_size, self.crop.image_size)
        height, width = np.array([picture.height]), np.array([picture.width])
        boxes = crop_boxes(self.seed, epoch, np.array([i]), height, width, self.crop)[0]
        for view, (top, left, h, w) in enumerate(boxes.tolist()):
            box = (left, top, left + w, top + h)
            pixels = np.asarray(picture.resize(size, Image.Resampling.BILINEAR, box=box))  # antialiased
            out[view] = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
