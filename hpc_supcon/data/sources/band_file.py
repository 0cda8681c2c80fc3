"""How a file becomes an image of any number of channels and of 8 or 16 bits.

8-bit gray and RGB are read by image_file, with the conversions of Pillow. Others are read as they are stored: only
gray becomes RGB and RGB gray. What a file stores is never scaled: 16-bit levels are those of 0..65535, whatever part
of them a camera uses.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ...errors import CorruptSample, DataError
from ..levels import PICTURE_CHANNELS
from .array_file import is_array, read_array
from .bands import Bands, Picture, Pixels
from .image_file import (
    CHANNELS_OF_MODE,
    FORMATS,
    MODE_OF_CHANNELS,
    Exif,
    ImageFormat,
    check_mode,
    check_size,
    depth_error,
    encoded_image,
    is_deep,
    mode_error,
    named,
    opened,
    read_image,
    turn_of,
)
from .source import channels_error, fit_images
from .tiff_file import GRAY, gray_pages, is_part, is_tiff, read_pages, read_tiff

_STORED_MODES = {"LA": 2, "RGBA": 4, "CMYK": 4, **CHANNELS_OF_MODE}
"""Pillow's modes of 8-bit channels that are read as they are stored."""


@dataclass(frozen=True)
class StoredForm:
    """What a file stores, as `read_stored` would read it."""

    channels: int
    bits: int
    size: tuple[int, int]
    """(width, height) in pixels, upright."""


def read_stored(path: Path, image_format: ImageFormat) -> Picture:
    """The image in the channels of the format, in its own size, turned as the format says. Raises CorruptSample;
    DataError where channels, depth or size are not those of the format; MissingExtra for some TIFFs."""
    if not image_format.is_picture:
        return _read_bands(path, image_format)
    pixels = _pixels_of_picture(path, image_format)
    return read_image(path, image_format) if pixels is None else _as_picture(path, pixels, image_format)


def encoded_stored(path: Path, image_format: ImageFormat) -> tuple[bytes, tuple[int, int]]:
    """Of 8-bit gray or RGB, as image_file.encoded_image."""
    pixels = _pixels_of_picture(path, image_format)
    if pixels is None:
        return encoded_image(path, image_format)
    image, buffer = _as_picture(path, pixels, image_format), io.BytesIO()
    image.save(buffer, "PPM")
    return buffer.getvalue(), image.size


def stored_form(path: Path, exif: Exif, channels: int | None) -> StoredForm:
    """The form of an image that is whole; channels: data.channels. Raises as `read_stored`."""
    form = None if is_array(path) else _form_of_picture(path, exif, channels)
    if form is not None:
        return form
    pixels = _stored_pixels(path, exif, channels)
    return StoredForm(len(pixels), 8 * pixels.itemsize, pixels.shape[:0:-1])


def _form_of_picture(path: Path, exif: Exif, channels: int | None) -> StoredForm | None:
    """The form of an image that will be read as 8-bit gray or RGB; None of any other."""
    try:
        with opened(path, deep=True) as image:
            with named(f"image {path}"):
                pages, deep = gray_pages(image), is_deep(image)
            if channels is None and pages > 1:
                raise DataError(
                    f"image {path} has {pages} gray pages of one size: data.channels={pages} reads them as channels, "
                    "data.channels=1 the first one alone"
                )
            if deep or is_part(image) or pages == channels != 1 or channels not in (None, *PICTURE_CHANNELS):
                return None
            if channels is None and image.mode not in CHANNELS_OF_MODE:
                raise mode_error(path, image.mode)
            with named(f"image {path}"):
                image.load()
                turn = turn_of(image, exif)
                size = (image if turn is None else image.transpose(turn)).size
            return StoredForm(channels or CHANNELS_OF_MODE[image.mode], 8, size)
    except CorruptSample as error:
        if (
            channels in PICTURE_CHANNELS
            or not isinstance(error.__cause__, UnidentifiedImageError)
            or not is_tiff(path)
        ):
            raise
        return None  # tifffile may read it


def _pixels_of_picture(path: Path, image_format: ImageFormat) -> Pixels | None:
    """What is not read by image_file though it is 8-bit gray or RGB: arrays, and the pages of a TIFF; else None."""
    if is_array(path):
        return read_array(path, image_format.channels if image_format.convert else None)
    if path.suffix.lower() not in FORMATS["TIFF"]:
        return None
    with opened(path) as image, named(f"image {path}"):
        if not is_part(image):
            stacks = image_format.convert and gray_pages(image) == image_format.channels > 1
            return read_pages(image) if stacks else None
    return read_tiff(path, image_format.channels)


def _as_picture(path: Path, pixels: Pixels, image_format: ImageFormat) -> Image.Image:
    """Pillow's image of pixels [C, H, W], converted as image_file does."""
    if pixels.dtype != np.uint8:
        raise depth_error(path)
    if len(pixels) not in PICTURE_CHANNELS:
        raise _other_channels(path, len(pixels), image_format)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)) if len(pixels) == 3 else pixels[0])
    check_mode(path, image.mode, image_format)
    check_size(path, image.size, image_format)
    return image.convert(MODE_OF_CHANNELS[image_format.channels])


def _read_bands(path: Path, image_format: ImageFormat) -> Bands:
    wanted = image_format.channels
    pixels = _stored_pixels(path, image_format.exif, wanted if image_format.convert else None)
    bits = 8 * pixels.itemsize
    if bits != image_format.bits:
        depth = "8 bits per channel" if image_format.bits == 8 else "more than 8 bits per channel (16)"
        raise DataError(
            f"images of mixed depths: {image_format.reference} has {depth}, {path} has {bits}: convert all "
            "to one depth"
        )
    if len(pixels) != wanted:
        if not image_format.convert or not {len(pixels), wanted} <= set(PICTURE_CHANNELS):
            raise _other_channels(path, len(pixels), image_format)
        square = torch.from_numpy(pixels)[None]
        pixels = fit_images(square, image_size=None, channels=wanted)[0].numpy()
    image = Bands(pixels)
    check_size(path, image.size, image_format)
    return image


def _other_channels(path: Path, stored: int, image_format: ImageFormat) -> DataError:
    if image_format.convert:
        return channels_error(f"image {path} has", stored, image_format.channels)
    return DataError(
        f"images of mixed channels: {image_format.reference} has {image_format.channels}, {path} has {stored}: "
        "all must have as many"
    )


def _stored_pixels(path: Path, exif: Exif, channels: int | None) -> Pixels:
    """uint8 or uint16 [C, H, W] as stored, but upright; channels: data.channels, see read_array and read_tiff."""
    if is_array(path):
        return read_array(path, channels)
    if is_tiff(path):
        return read_tiff(path, channels)
    with opened(path, deep=True) as image, named(f"image {path}"):
        deep = is_deep(image)
        if not deep and image.mode not in _STORED_MODES:
            raise DataError(f"image {path} has mode {image.mode}, whose channels are not read as they are stored")
        if deep and image.mode not in ("I", *GRAY):
            raise DataError(
                f"image {path} has more than 8 bits per channel, which Pillow does not read in color: save it as "
                "TIFF or .npy"
            )
        image.load()
        turn = turn_of(image, exif)
        levels = np.array(image if turn is None else image.transpose(turn), dtype=np.uint16 if deep else np.uint8)
    return levels[None] if levels.ndim == 2 else np.ascontiguousarray(levels.transpose(2, 0, 1))
