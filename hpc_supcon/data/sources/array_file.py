"""Images in .npy files: an array of NumPy, uint8 or uint16, [H, W], [H, W, C] or [C, H, W]. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from ...errors import DataError
from ..levels import MAX_CHANNELS, PICTURE_CHANNELS
from .bands import Pixels
from .image_file import ARRAY_SUFFIX, check_pixels, named
from .listing import check_regular
from .source import channels_error


def is_array(path: Path) -> bool:
    """By the end of its name."""
    return path.suffix.lower() == ARRAY_SUFFIX


def read_array(path: Path, channels: int | None) -> Pixels:
    """uint8 or uint16 [C, H, W], in the byte order of this machine.

    channels: data.channels, by which the axis of the channels is found: the last one that has this size, else the
    first one; of 1 or 3 the one that has size 1 or 3. None: the smaller of the two. Raises CorruptSample; DataError
    for an array of another form, and for channels that cannot be converted.
    """
    with named(f"image {path}"):
        check_regular(path)
        stored = np.lib.format.open_memmap(path, mode="r")  # checks the header against the file's size
        if stored.dtype.newbyteorder("=") not in (np.dtype(np.uint8), np.dtype(np.uint16)):
            raise DataError(
                f"image {path} is an array of {stored.dtype}: save it as uint8 or uint16, of 0 to full scale"
            )
        if stored.ndim not in (2, 3) or 0 in stored.shape:
            raise DataError(f"image {path} is an array of shape {list(stored.shape)}: expected {_SHAPES}")
        first = _channels_come_first(path, stored.shape, channels) if stored.ndim == 3 else None
        pixels = stored[None] if first is None else stored if first else stored.transpose(2, 0, 1)
        check_pixels(pixels.shape[1] * pixels.shape[2])
        return np.array(pixels, dtype=stored.dtype.newbyteorder("="), order="C")


_SHAPES = f"[H, W], [H, W, C] or [C, H, W] with at most {MAX_CHANNELS} channels"


def _channels_come_first(path: Path, shape: tuple[int, ...], channels: int | None) -> bool:
    """Of an array of three axes. Raises DataError where neither the first nor the last can be that of channels."""
    smaller = min(shape[0], shape[2])
    wanted: Collection[int] = {smaller} if channels is None else {channels}
    if channels in PICTURE_CHANNELS:
        wanted = PICTURE_CHANNELS
    if smaller > MAX_CHANNELS:
        raise DataError(f"image {path} is an array of shape {list(shape)}: expected {_SHAPES}")
    if shape[2] in wanted:
        return False
    if shape[0] in wanted:
        return True
    assert channels is not None
    raise channels_error(f"image {path}, an array of shape {list(shape)}, has", smaller, channels)
