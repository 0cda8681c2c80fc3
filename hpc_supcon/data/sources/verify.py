"""Decodes every image of a data set, to find before a run those that training would refuse."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from .beton import open_beton
from .source import Source
from .splits import open_source

_CHUNK = 64  # images that a thread decodes at a time


@dataclass(frozen=True)
class UnusableImage:
    """An image that training would refuse."""

    index: int
    message: str
    """Names the file."""


@dataclass(frozen=True)
class SplitReport:
    """What a split contains. Without problems, every image decodes."""

    images: int
    channels: int
    sizes: dict[tuple[int, int], int]
    """(width, height) in pixels -> number of images that decode."""
    classes: dict[str, int]
    """Class -> number of images."""
    problems: tuple[UnusableImage, ...]


def verify(
    path: str | Path,
    *,
    source: str = "image_folder",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, SplitReport]:
    """A report for each split of a set of OWN_SOURCES ("train", "test", perhaps "validation"), or for a .beton file.

    source: the kind of the set, whose root is `path`. Every image is decoded, by `workers` threads (None: one per
    processor); progress(images decoded, all images). options: as training would read the set, see SourceOptions.
    Raises DataError where the set as a whole is wrong: its layout, sizes that need image_size, a .beton that differs
    from its manifest.
    """
    file = Path(path)
    if source == "image_folder" and (file.suffix == ".beton" or file.is_file()):
        given = {key: options[key] for key in ("image_size", "channels", "exif") if key in options}
        return {file.name: verify_source(open_beton(file, **given), workers=workers, progress=progress)}
    splits = open_source(source, path, **options)
    return {
        name: verify_source(one, workers=workers, progress=progress)
        for name, one in vars(splits).items()
        if one is not None
    }


def verify_source(
    source: Source, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> SplitReport:
    """The report of one source; see `verify`."""
    n = len(source)

    def decode(i: int) -> tuple[int, int] | UnusableImage:
        try:
            return source.pil_image(i).size
        except DataError as error:
            return UnusableImage(i, str(error))

    def decode_chunk(start: int) -> list[tuple[int, int] | UnusableImage]:
        return [decode(i) for i in range(start, min(start + _CHUNK, n))]

    sizes: Counter[tuple[int, int]] = Counter()
    problems: list[UnusableImage] = []
    starts = range(0, n, _CHUNK)
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for start, results in zip(starts, pool.map(decode_chunk, starts), strict=True):
            problems += [result for result in results if isinstance(result, UnusableImage)]
            sizes.update(result for result in results if not isinstance(result, UnusableImage))
            if progress is not None:
                progress(start + len(results), n)
    counts = Counter(source.labels.tolist())
    classes = {name: counts[label] for label, name in enumerate(source.classes)}
    return SplitReport(n, source.channels, dict(sizes), classes, tuple(problems))
