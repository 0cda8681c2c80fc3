"""Images that Pillow has no mode for: any number of channels, of 8 or 16 bits each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.unsignedinteger[Any]]
"""Levels, uint8 or uint16."""


class Bands:
    """An image with those methods of Pillow's `Image` that resizing and cropping take."""

    def __init__(self, pixels: Pixels) -> None:
        """pixels: uint8 or uint16 [C, H, W]; not copied."""
        assert pixels.ndim == 3, pixels.shape
        assert pixels.dtype in (np.uint8, np.uint16), pixels.dtype
        self.pixels = pixels

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height

    @property
    def width(self) -> int:
        return self.pixels.shape[2]

    @property
    def height(self) -> int:
        return self.pixels.shape[1]

    def resize(
        self, size: tuple[int, int], resample: Image.Resampling, box: tuple[float, float, float, float] | None = None
    ) -> Bands:
        """As Pillow's `Image.resize`, each channel on its own as floating-point numbers, rounded once at the end."""
        width, height = size
        resized = np.empty((len(self.pixels), height, width), dtype=self.pixels.dtype)
        for band, out in zip(self.pixels, resized, strict=True):
            levels = np.asarray(Image.fromarray(band.astype(np.float32)).resize(size, resample, box=box))
            out[:] = np.clip(np.rint(levels), 0, np.iinfo(band.dtype).max)
        return Bands(resized)

    def crop(self, box: tuple[int, int, int, int]) -> Bands:
        """As Pillow's `Image.crop`, of a box within the image."""
        left, top, right, bottom = box
        return Bands(self.pixels[:, top:bottom, left:right])


Picture = Image.Image | Bands
"""One image as it is stored: a Pillow image of mode L or RGB, or Bands of any other form."""
