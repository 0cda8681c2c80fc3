"""Writes any source as a .beton file, with threads in one process; the file is complete or absent.

FFCV's own writer waits forever when one of its worker processes dies, on a full disk for instance, and leaves a
file that can be opened. The format is simple enough to be written here.
"""

from __future__ import annotations

import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ...errors import ConfigError, DataError
from ...files import atomic_path
from ..levels import bits_of, is_picture
from ..philox import random_index
from .bands import Bands
from .beton import (
    ALLOCATION,
    FIELD,
    FORMAT,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    JPEG,
    RAW,
    SAMPLE,
    SAMPLES_AT,
    VERSION,
    digest_of,
    labels_digest,
    manifest_path,
)
from .encoded import EncodedSource
from .folder import FolderSource
from .image_file import named, open_image
from .jpeg import whole_jpeg
from .source import Source, pixel_dtype

PAGE = 1 << 23
"""Bytes. FFCV reads whole pages, so no image may cross a page boundary."""
SIDE = 65_500
"""Pixels of the longest side: what libjpeg decodes; the format itself has 16 bits for it."""
QUALITY = 90
_CHUNK = 64  # images that a thread encodes at a time

ConvertProgress = Callable[[int, int], None]
"""(images written, all images)."""


@dataclass(frozen=True)
class _Encoding:
    source: Source
    max_size: int | None
    jpeg_quality: int | None
    raw_fraction: float

    def sample(self, i: int) -> tuple[int, int, int, bytes]:
        """(mode, width, height, bytes) of image i. Raises CorruptSample, also where the file would only be copied;
        DataError for an image that a .beton cannot hold."""
        image = self.source.pil_image(i)
        assert not isinstance(image, Bands)  # see convert
        longest = max(image.size)
        limit = longest if self.max_size is None else min(self.max_size, longest)
        if limit > SIDE:
            raise DataError(
                f"{self.name_of(i)} is {image.width}x{image.height} pixels, and a side of a .beton's images has at "
                f"most {SIDE}: shrink such images with --max-size={SIDE} or less"
            )
        with named(self.name_of(i)):
            if limit < longest:
                width, height = (max(1, round(side * limit / longest)) for side in image.size)
                image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
            return self._encode(i, image, shrunk=limit < longest)

    def _encode(self, i: int, image: Image.Image, *, shrunk: bool) -> tuple[int, int, int, bytes]:
        if random_index(0, 0, i, 0, 1 << 30) < self.raw_fraction * (1 << 30):
            return RAW, *image.size, np.asarray(image.convert("RGB")).tobytes()
        if not shrunk and self.jpeg_quality is None and (copy := self._jpeg_file(i, image)) is not None:
            return JPEG, *image.size, copy
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY if self.jpeg_quality is None else self.jpeg_quality)
        return JPEG, *image.size, buffer.getvalue()

    def _jpeg_file(self, i: int, image: Image.Image) -> bytes | None:
        """The bytes of the image's file where it is a JPEG of the same mode and the same way up, which every decoder
        takes; else None."""
        if not isinstance(self.source, FolderSource | EncodedSource):
            return None
        data, size = self.source.encoded(i)  # without EXIF data, turned where need be
        copy = whole_jpeg(data)
        if copy is None or size != image.size:
            return None
        with open_image(io.BytesIO(copy)) as stored:
            return copy if stored.mode == image.mode else None

    def name_of(self, i: int) -> str:
        if isinstance(self.source, EncodedSource):
            return f"image {self.source.name(i)}"
        return f"image {self.source.paths[i]}" if isinstance(self.source, FolderSource) else f"image {i}"

    def chunk(self, start: int) -> list[tuple[int, int, int, bytes]]:
        return [self.sample(i) for i in range(start, min(start + _CHUNK, len(self.source)))]


def convert(
    source: Source,
    out: str | Path,
    *,
    name: str = "",
    splits: Sequence[str] | None = None,
    max_size: int | None = None,
    jpeg_quality: int | None = None,
    raw_fraction: float = 0.0,
    workers: int | None = None,
    progress: ConvertProgress | None = None,
) -> dict[str, Any]:
    """Write the source's images and labels to OUT.beton, and their manifest beside it; returns the manifest.

    name: of the data set, which `open_beton` can check. splits: those that are converted together with this one, for
    the manifest. max_size: longest side in pixels, larger images are shrunk. jpeg_quality 1..95: JPEG files are
    re-encoded too; None copies those that are neither shrunk nor turned and that every decoder takes (see
    jpeg.whole_jpeg), without EXIF data, and encodes all others at 90. raw_fraction in [0, 1]: share of images stored
    as pixels, which are faster to read and several times as large. workers: threads; None takes one per processor.
    progress: called after every 64 images.

    Until it is complete the file has another name, and it is not read without its manifest. Raises ConfigError
    for values outside their ranges, DataError for images of another form than 8-bit gray or RGB and when it cannot be
    written, CorruptSample for an image.
    """
    out = Path(out)
    if out.suffix != ".beton":
        raise ConfigError(f"the name of the file to write must end in .beton, not be {out.name}")
    if not 0 <= raw_fraction <= 1 or not (jpeg_quality is None or 1 <= jpeg_quality <= 95):
        raise ConfigError(
            f"raw_fraction must be in [0, 1] and jpeg_quality in 1..95, not {raw_fraction}, {jpeg_quality}"
        )
    if max_size is not None and max_size < 1:
        raise ConfigError(f"max_size must be at least 1 pixel, not {max_size}")
    if not is_picture(source.channels, pixel_dtype(source)):
        raise DataError(
            f"a .beton file holds 8-bit images of 1 or 3 channels, but these have {source.channels} of "
            f"{bits_of(pixel_dtype(source))} bits: train on them with data.loader=resident or torch"
        )
    encoding = _Encoding(source, max_size, jpeg_quality, raw_fraction)
    try:
        # the manifest is renamed last: a file is not read without the one that matches it
        with atomic_path(manifest_path(out)) as partial_manifest, atomic_path(out) as partial:
            with partial.open("wb") as file:
                samples = _write(file, encoding, workers or len(os.sched_getaffinity(0)), progress)
            manifest = _manifest(partial, source, samples, name) | {
                "max_size": max_size,
                "jpeg_quality": jpeg_quality,
                "raw_fraction": raw_fraction,
                "splits": splits,
            }
            partial_manifest.write_text(json.dumps(manifest), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
    return manifest


def _write(file: BinaryIO, encoding: _Encoding, workers: int, progress: ConvertProgress | None) -> np.ndarray:
    """Write the whole file; returns its table of samples."""
    n = len(encoding.source)
    samples, allocations = np.zeros(n, dtype=SAMPLE), np.zeros(n, dtype=ALLOCATION)
    samples["label"] = encoding.source.labels.numpy()
    position = _aligned(SAMPLES_AT + samples.nbytes)
    for i, (mode, width, height, data) in enumerate(_encoded(encoding, workers)):
        if len(data) > PAGE:
            raise DataError(
                f"{encoding.name_of(i)} takes {len(data)} bytes, more than the {PAGE} of a page: shrink such images "
                f"with --max-size, or store fewer as pixels with --raw-fraction"
            )
        if position // PAGE != (position + len(data) - 1) // PAGE:
            position = _aligned(position)
        file.seek(position)
        file.write(data)
        samples["image"][i] = (mode, width, height, position)
        allocations[i] = (i, position, len(data))
        position += len(data)
        if progress is not None and ((i + 1) % _CHUNK == 0 or i + 1 == n):
            progress(i + 1, n)
    table = _aligned(position)
    file.seek(table)
    file.write(allocations.tobytes())
    file.seek(0)
    file.write(_head(n, table))
    file.write(samples.tobytes())
    return samples


def _encoded(encoding: _Encoding, workers: int) -> Iterator[tuple[int, int, int, bytes]]:
    """All samples in order; threads encode a few chunks ahead."""
    starts = iter(range(0, len(encoding.source), _CHUNK))
    ahead: deque[Future[list[tuple[int, int, int, bytes]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for start in starts:
                ahead.append(pool.submit(encoding.chunk, start))
                if len(ahead) > 2 * workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _head(n: int, table: int) -> bytes:
    header, fields = np.zeros(1, dtype=HEADER), np.zeros(2, dtype=FIELD)
    header[0] = (VERSION, 2, PAGE, n, table)
    for field, type_id, name in zip(fields, (IMAGE_FIELD, INT_FIELD), (b"image", b"label"), strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name, dtype=np.uint8)
    return header.tobytes() + fields.tobytes()


def _aligned(position: int) -> int:
    return -(-position // PAGE) * PAGE


def _manifest(path: Path, source: Source, samples: np.ndarray, name: str) -> dict[str, Any]:
    sides = np.unique(np.concatenate((samples["image"]["width"], samples["image"]["height"])))
    # only files have EXIF data; of other sets there is nothing to say
    exif = {"exif": source.image_format.exif} if isinstance(source, FolderSource | EncodedSource) else {}
    return exif | {
        "format": FORMAT,
        "name": name,
        "samples": len(samples),
        "bytes": path.stat().st_size,
        "sha256": digest_of(path),
        "labels_sha256": labels_digest(samples["label"]),
        "labels": samples["label"].tolist(),
        "classes": list(source.classes),
        "channels": source.channels,
        "image_size": int(sides[0]) if len(sides) == 1 else "mixed",
    }
