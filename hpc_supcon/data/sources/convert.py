"""Writing .beton files: any source, in one process with threads, whole or not at all.

FFCV's own writer waits for ever when a worker process of its dies, on a full disk for instance, and leaves a
file that opens. The format is simple enough to write it here.
"""

from __future__ import annotations

import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ...errors import ConfigError, DataError
from ...files import atomic_path
from ..loaders.crops import replacement
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
from .folder import FolderSource
from .source import Source

PAGE = 1 << 23
"""Bytes. FFCV reads whole pages, so no image may lie across the edge of one."""
QUALITY = 90
_CHUNK = 64  # images per task of a thread

Progress = Callable[[int, int], None]
"""(images done, images in all), called now and then."""


@dataclass(frozen=True)
class _Encoding:
    source: Source
    max_size: int | None
    jpeg_quality: int | None
    raw_fraction: float

    def sample(self, i: int) -> tuple[int, int, int, bytes]:
        """(mode, width, height, bytes) of image i. Raises CorruptSample: what does not decode is not copied."""
        picture = self.source.picture(i)
        longest = max(picture.size)
        if self.max_size is not None and longest > self.max_size:
            width, height = (max(1, round(side * self.max_size / longest)) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
            longest = 0
        size = picture.size
        if replacement(0, 0, i, 0, 1 << 30) < self.raw_fraction * (1 << 30):
            return RAW, *size, np.asarray(picture.convert("RGB")).tobytes()
        if longest and self.jpeg_quality is None and (copy := self._jpeg_file(i, picture.mode)) is not None:
            return JPEG, *size, copy
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=QUALITY if self.jpeg_quality is None else self.jpeg_quality)
        return JPEG, *size, buffer.getvalue()

    def _jpeg_file(self, i: int, mode: str) -> bytes | None:
        """The file's own bytes where they are a JPEG of that mode already."""
        if not isinstance(self.source, FolderSource):
            return None
        data = self.source.paths[i].read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            return data if (image.format, image.mode) == ("JPEG", mode) else None

    def chunk(self, start: int) -> list[tuple[int, int, int, bytes]]:
        return [self.sample(i) for i in range(start, min(start + _CHUNK, len(self.source)))]


def convert(
    source: Source,
    out: str | Path,
    *,
    name: str = "",
    max_size: int | None = None,
    jpeg_quality: int | None = None,
    raw_fraction: float = 0.0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the source's images and labels to OUT.beton, and their manifest beside it; returns the manifest.

    name: what `open_beton` can be told to insist on. max_size: longest side in pixels, larger images are shrunk.
    jpeg_quality 1..95: JPEG files are re-encoded too; None copies those that are not shrunk as they are, and
    encodes all others at 90. raw_fraction in [0, 1]: share of images stored as pixels, faster to read and several
    times as large. workers: threads; None takes one per processor.

    Until it is complete the file has another name, and it is not read without its manifest. Raises ConfigError
    for values that make no sense, DataError when it cannot be written, CorruptSample for an image.
    """
    out = Path(out)
    if out.suffix != ".beton":
        raise ConfigError(f"the file to write must end in .beton, not be called {out.name}")
    if not 0 <= raw_fraction <= 1 or not (jpeg_quality is None or 1 <= jpeg_quality <= 95):
        raise ConfigError(
            f"raw_fraction must be in [0, 1] and jpeg_quality in 1..95, not {raw_fraction}, {jpeg_quality}"
        )
    if max_size is not None and max_size < 1:
        raise ConfigError(f"max_size must be at least 1 pixel, not {max_size}")
    encoding = _Encoding(source, max_size, jpeg_quality, raw_fraction)
    try:
        # the manifest gets its name last: a file is not read without the one that matches it
        with atomic_path(manifest_path(out)) as manifest_part, atomic_path(out) as part:
            with part.open("wb") as file:
                samples = _write(file, encoding, workers or len(os.sched_getaffinity(0)), progress)
            manifest = _manifest(part, source, samples, name) | {
                "max_size": max_size,
                "jpeg_quality": jpeg_quality,
                "raw_fraction": raw_fraction,
            }
            manifest_part.write_text(json.dumps(manifest), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
    return manifest


def _write(file: BinaryIO, encoding: _Encoding, workers: int, progress: Progress | None) -> np.ndarray:
    """The whole file; returns its table of samples."""
    n = len(encoding.source)
    samples, allocations = np.zeros(n, dtype=SAMPLE), np.zeros(n, dtype=ALLOCATION)
    samples["label"] = encoding.source.labels.numpy()
    position = _aligned(SAMPLES_AT + samples.nbytes)
    for i, (mode, width, height, data) in enumerate(_encoded(encoding, workers)):
        if len(data) > PAGE:
            raise DataError(f"image {i} takes {len(data)} bytes, more than the {PAGE} of a page: set max_size")
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
    """All samples in order, encoded by threads a few chunks ahead."""
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


def _manifest(part: Path, source: Source, samples: np.ndarray, name: str) -> dict[str, Any]:
    sides = np.unique(np.concatenate((samples["image"]["width"], samples["image"]["height"])))
    return {
        "format": FORMAT,
        "name": name,
        "samples": len(samples),
        "bytes": part.stat().st_size,
        "sha256": digest_of(part),
        "labels_sha256": labels_digest(samples["label"]),
        "labels": samples["label"].tolist(),
        "classes": list(source.classes),
        "channels": source.channels,
        "image_size": int(sides[0]) if len(sides) == 1 else "mixed",
    }
