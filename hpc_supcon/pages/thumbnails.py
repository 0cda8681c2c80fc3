"""The images of a map, small: thumbnails.webp, one picture of tiles, and thumbnails.json, which says what is where.

thumbnails.json: {"tile": [width, height], "columns": tiles of a row, "index": [the image of each tile]}.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..files import write_atomically

WEBP, JSON = "thumbnails.webp", "thumbnails.json"
TILE = 32
"""Pixels of the longer side of a tile, at most."""
MAX_SIDE = 16383
"""Pixels of a side of a WebP picture."""
MAX_BYTES = 2_900_000
"""Of the picture: a page with it, as base64 text, stays under 5 MB."""
QUALITIES = (80, 65, 50, 35, 20, 10)


@dataclass(frozen=True)
class Thumbnails:
    """A picture of tiles as it is on the disk. `index`: the image of each tile, row by row."""

    webp: bytes
    tile: tuple[int, int]
    columns: int
    index: NDArray[np.int64]


def write_thumbnails(folder: Path, images: NDArray[np.uint8], index: Sequence[int] | NDArray[np.integer]) -> Path:
    """Write `folder`/thumbnails.webp and thumbnails.json; returns the picture's path.

    images: uint8 [n, C, H, W], C 1 or 3; index: [n], the numbers of the images in their split, as in the maps. Larger
    images become smaller, with their shape kept. The picture has the best of some qualities with which it is under
    MAX_BYTES. Raises ValueError for other shapes and for more tiles than a picture can have, OSError.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != np.uint8 or len(images) != len(index):
        raise ValueError(f"thumbnails of {images.dtype} {images.shape} with {len(index)} indices")
    n, _, height, width = images.shape
    factor = min(1.0, TILE / max(height, width, 1))
    tile = (max(1, round(width * factor)), max(1, round(height * factor)))
    columns = max(1, math.ceil(math.sqrt(n * tile[1] / tile[0])))
    rows = -(-n // columns)
    if n == 0 or columns * tile[0] > MAX_SIDE or rows * tile[1] > MAX_SIDE:
        raise ValueError(f"{n} thumbnails of {tile[0]} x {tile[1]} pixels do not fit into a WebP picture")
    webp = _encoded(_sheet(images, tile, columns, rows))
    # the picture first: a reader that finds the description finds the picture too
    write_atomically(folder / WEBP, webp, durable=False)
    description = {"tile": tile, "columns": columns, "index": [int(i) for i in index]}
    write_atomically(folder / JSON, json.dumps(description) + "\n", durable=False)
    return folder / WEBP


def _sheet(images: NDArray[np.uint8], tile: tuple[int, int], columns: int, rows: int) -> Image.Image:
    n, channels, height, width = images.shape
    mode = "RGB" if channels == 3 else "L"
    if (width, height) == tile:
        padded = np.zeros((rows * columns, channels, height, width), dtype=np.uint8)
        padded[:n] = images
        pixels = padded.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
        pixels = pixels.reshape(rows * height, columns * width, channels)
        return Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    sheet = Image.new(mode, (columns * tile[0], rows * tile[1]))
    for i, image in enumerate(images):
        pixels = image.transpose(1, 2, 0) if channels == 3 else image[0]
        small = Image.fromarray(np.ascontiguousarray(pixels)).resize(tile, Image.Resampling.BOX)
        sheet.paste(small, (i % columns * tile[0], i // columns * tile[1]))
    return sheet


def _encoded(sheet: Image.Image) -> bytes:
    payload = b""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        sheet.save(buffer, "WEBP", quality=quality, method=4)
        payload = buffer.getvalue()
        if len(payload) <= MAX_BYTES:
            break
    return payload


def read_thumbnails(folder: Path) -> Thumbnails | None:
    """What `write_thumbnails` wrote into `folder`; None where it wrote nothing. Raises OSError, ValueError."""
    if not (folder / JSON).is_file():
        return None
    found = json.loads((folder / JSON).read_bytes())
    try:
        (width, height), columns = map(int, found["tile"]), int(found["columns"])
        index = np.asarray(found["index"], dtype=np.int64)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"not a description of thumbnails: {error}") from None
    webp = (folder / WEBP).read_bytes()
    try:
        with Image.open(io.BytesIO(webp), formats=["WEBP"]) as picture:
            size = picture.size
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{WEBP}: not a WebP picture: {error}") from None
    fits = index.ndim == 1 and min(width, height, columns) > 0 and size[0] == columns * width
    if not fits or size[1] != -(-len(index) // columns) * height:
        raise ValueError(f"{JSON} does not describe {WEBP}")
    return Thumbnails(webp, (width, height), columns, index)
