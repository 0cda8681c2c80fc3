"""Looking at every image before a run does."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError
from .beton import open_beton
from .folder import open_folder
from .source import Source


@dataclass(frozen=True)
class Problem:
    """One image that training would refuse."""

    index: int
    message: str
    """Names the file."""


@dataclass(frozen=True)
class Report:
    """What a set of images is. Without problems, every image decodes."""

    images: int
    channels: int
    sizes: dict[tuple[int, int], int]
    """(width, height) in pixels -> number of images that decode."""
    classes: dict[str, int]
    """Class -> number of images."""
    problems: tuple[Problem, ...]


def verify(
    path: str | Path, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Report]:
    """A report for each split of an image folder ("train", "test", perhaps "validation"), or for a .beton file.

    Every image is decoded, by `workers` threads (None: one per processor); progress(done, all) is called now and
    then. Raises DataError where the set as a whole is wrong: its layout, a .beton that is not what its manifest
    says.
    """
    path = Path(path)
    if path.suffix == ".beton" or path.is_file():
        # The size does not matter here: images are looked at as they are stored.
        return {path.name: verify_source(open_beton(path, image_size=1), workers=workers, progress=progress)}
    train, validation, test = open_folder(path, image_size=1, channels=None)
    splits = {"train": train, "validation": validation, "test": test}
    return {
        name: verify_source(source, workers=workers, progress=progress)
        for name, source in splits.items()
        if source is not None
    }


def verify_source(
    source: Source, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Report:
    """The report of one source; see `verify`."""

    n = len(source)

    def look(i: int) -> tuple[int, int] | Problem:
        try:
            return source.picture(i).size
        except DataError as error:
            return Problem(i, str(error))

    def look_at_some(start: int) -> list[tuple[int, int] | Problem]:
        return [look(i) for i in range(start, min(start + 64, n))]

    sizes: Counter[tuple[int, int]] = Counter()
    problems: list[Problem] = []
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for start, some in zip(range(0, n, 64), pool.map(look_at_some, range(0, n, 64)), strict=True):
            problems += [seen for seen in some if isinstance(seen, Problem)]
            sizes.update(seen for seen in some if not isinstance(seen, Problem))
            if progress is not None:
                progress(start + len(some), n)
    counts = Counter(source.labels.tolist())
    classes = {name: counts[label] for label, name in enumerate(source.classes)}
    return Report(n, source.channels, dict(sizes), classes, tuple(problems))
