"""Reads samples one by one with Pillow: in worker processes, and in every loader whose own decoder refuses a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ...errors import CorruptSample
from ..crop_boxes import central_boxes, crop_boxes
from ..philox import FloatArray, IntArray, random_index
from ..sources.bands import Pixels
from ..sources.source import Source, channels_first, pixel_dtype
from .base import LEFT_OUT, CropOptions, OnCorrupt

ATTEMPTS = 100
"""Images tried in the place of a corrupt one before the whole set is considered corrupt."""


@dataclass
class SampleReader:
    """Images of a source in the shape that batches have: [C, S, S], or [V, C, S, S] with crops."""

    source: Source
    seed: int
    crop: CropOptions | None
    on_corrupt: OnCorrupt

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        if self.crop is None:
            return self.source.channels, self.source.image_size, self.source.image_size
        return self.crop.views, self.source.channels, self.crop.image_size, self.crop.image_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the levels: uint8 or uint16."""
        return pixel_dtype(self.source)

    def fill(self, out: Pixels, epoch: int, index: IntArray) -> IntArray:
        """Write the images of index int64 [B] into out [B, ...]; returns the indices of those that were written.

        A corrupt image is replaced, or its index is LEFT_OUT and its part of `out` has no meaning. Any number of
        threads may call this. Raises CorruptSample naming path and index, DataError where an image is not of the
        set's format.
        """
        return np.array([self._read_or_replace(out[k], epoch, i) for k, i in enumerate(index.tolist())], np.int64)

    def _read_or_replace(self, out: Pixels, epoch: int, i: int) -> int:
        try:
            self._read(out, epoch, i)
            return i
        except CorruptSample as error:
            if self.on_corrupt == "fail":
                raise CorruptSample(f"{error} (image {i} of the set)") from error
            return LEFT_OUT if self.on_corrupt == "leave_out" else self._replace(out, epoch, i, error)

    def _replace(self, out: Pixels, epoch: int, i: int, reason: CorruptSample) -> int:
        """Write a valid sample in the place of corrupt sample i; its index, a pure function of (seed, epoch, i)."""

        def read(j: int) -> bool:
            try:
                self._read(out, epoch, j)
            except CorruptSample:
                return False
            return True

        return find_replacement(self.seed, epoch, i, len(self.source), read, reason)

    def boxes(self, epoch: int, index: IntArray, heights: IntArray, widths: IntArray) -> FloatArray:
        """float64 [B, V, 4]: the crops of these images; without crops the one central box that `Source.read` takes.

        index, heights, widths: int64 [B], the sizes in pixels as stored.
        """
        crop = self.crop
        if crop is None:
            return central_boxes(heights, widths, self.source.image_size)
        return crop_boxes(
            self.seed, epoch, index, heights, widths, views=crop.views, scale=crop.scale, ratio=crop.ratio
        ).astype(np.float64)

    def _read(self, out: Pixels, epoch: int, i: int) -> None:
        if self.crop is None:
            out[:] = self.source.read(i).numpy()
            return
        image, size = self.source.pil_image(i), (self.crop.image_size, self.crop.image_size)
        boxes = self.boxes(epoch, np.array([i]), np.array([image.height]), np.array([image.width]))[0]
        for view, (top, left, h, w) in enumerate(boxes.tolist()):
            box = (left, top, left + w, top + h)
            out[view] = channels_first(image.resize(size, Image.Resampling.BILINEAR, box=box))  # antialiased


def find_replacement(
    seed: int, epoch: int, i: int, n: int, is_valid: Callable[[int], bool], reason: CorruptSample
) -> int:
    """The image of n that takes the place of corrupt image i in that epoch, the same one in every loader.

    Random ones are tried in turn. Raises CorruptSample, with the reason why i is corrupt, when none of ATTEMPTS is
    valid.
    """
    for attempt in range(ATTEMPTS):
        j = random_index(seed, epoch, i, attempt, n)
        if is_valid(j):
            return j
    raise CorruptSample(f"{reason} (image {i} of the set), and neither do {ATTEMPTS} others tried in its place")
