"""TIFF files of several pages or of forms that Pillow does not read, or of whose 16 bits it drops some.

Pillow reads gray pages. All else is read with tifffile, an optional package, imported where it is needed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ...errors import DataError, MissingExtra, first_line
from ..levels import MAX_CHANNELS
from .bands import Pixels
from .image_file import check_pixels, named, open_image, regular

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SAMPLES = 277
"""Tag of a TIFF: numbers of a pixel. Pillow reads one of several as gray where each has a plane of its own."""
_ORIENTATION = 274
"""Tag of a TIFF: which way its rows and columns run, numbered as in EXIF."""
GRAY = {"L": np.uint8, "I;16": np.uint16, "I;16L": np.uint16, "I;16B": np.uint16, "I;16N": np.uint16}
"""Pillow's modes of gray -> what their levels are."""


def is_tiff(path: Path) -> bool:
    """By its first bytes. Raises CorruptSample and DataError as image_file.regular."""
    with regular(path) as file, named(f"image {path}"):
        return file.read(4) in _MAGIC


def is_part(image: Image.Image) -> bool:
    """Whether Pillow would read one of several samples of the pixels of a TIFF."""
    return image.format == "TIFF" and image.mode in GRAY and image.tag_v2.get(_SAMPLES, 1) > 1  # type: ignore[attr-defined]


def gray_pages(image: Image.Image) -> int:
    """How many pages a TIFF has that are all gray, of one size and depth; 1 where they are not."""
    n = getattr(image, "n_frames", 1)
    if image.format != "TIFF" or n == 1 or image.mode not in GRAY or is_part(image):
        return 1
    forms = set()
    for page in range(n):
        image.seek(page)
        forms.add((image.mode, image.size))
    image.seek(0)
    return n if len(forms) == 1 else 1


def read_pages(image: Image.Image) -> Pixels:
    """uint8 or uint16 [pages, H, W] of a TIFF of gray pages, turned upright by its tag."""
    n, dtype = gray_pages(image), GRAY[image.mode]
    if n > MAX_CHANNELS:
        raise DataError(f"its {n} pages are more than the {MAX_CHANNELS} channels of an image")
    pages = []
    for page in range(n):
        image.seek(page)
        pages.append(np.array(image, dtype=dtype))  # loads it
    return np.stack(pages)


def read_tiff(path: Path, channels: int | None) -> Pixels:
    """uint8 or uint16 [C, H, W]: the samples of the first page or, of several gray pages of one size, the pages.

    channels: data.channels; of several gray pages the first one is the image where it is 1, or 3 for other than three
    pages. Raises CorruptSample, DataError and, for what only tifffile reads, MissingExtra.
    """
    with regular(path) as file, named(f"image {path}"):
        try:
            image = open_image(file)
        except UnidentifiedImageError:
            image = None
        if image is not None and image.mode in GRAY and not is_part(image):
            pages = gray_pages(image)
            stacked = read_pages(image) if channels not in (1, 3) or channels == pages else None
            return np.array(image, dtype=GRAY[image.mode])[None] if stacked is None else stacked
    return _read_with_tifffile(path)


def _read_with_tifffile(path: Path) -> Pixels:
    try:
        import tifffile
    except ImportError:
        raise MissingExtra(
            f"image {path}: Pillow does not read this form of TIFF; pip install 'hpc-supcon[tiff]'"
        ) from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong is raised, too
    # of an open file, and not as OME-TIFF: such a file may name other files, which would be read as well
    with regular(path) as file, named(f"image {path}"), tifffile.TiffFile(file, is_ome=False) as tiff:
        first = tiff.pages.first
        check_pixels(first.imagelength * first.imagewidth)
        try:
            pixels = _to_bands(path, first.asarray(maxworkers=1), first.axes)
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            needs = f"image {path}: {first_line(error)}: pip install imagecodecs"
        else:
            tag = first.tags.get(_ORIENTATION)
            return np.ascontiguousarray(_turned(pixels, 1 if tag is None else int(tag.value)))
    raise MissingExtra(needs)


def _to_bands(path: Path, pixels: Any, axes: str) -> Pixels:
    """[C, H, W] of an array whose axes are named as tifffile does: Y, X and S for the samples of a pixel."""
    if axes not in ("YX", "YXS", "SYX"):
        raise DataError(f"image {path} has axes {axes}: one image of rows, columns and channels is read")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(f"image {path} has levels of type {pixels.dtype}: save it as uint8 or uint16")
    bands: Pixels = pixels[None] if axes == "YX" else pixels if axes == "SYX" else pixels.transpose(2, 0, 1)
    if len(bands) > MAX_CHANNELS:
        raise DataError(f"image {path} has {len(bands)} channels: at most {MAX_CHANNELS} are read")
    return bands


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """[C, H, W] turned upright, as Pillow does: orientation 1..8 of the tag, others are of no account."""
    if orientation not in range(2, 9):
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(1, 2)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[:, ::rows, ::columns]
