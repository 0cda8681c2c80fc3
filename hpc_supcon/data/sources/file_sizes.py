"""The sizes of many files, asked for by many threads: file systems of clusters answer many questions at once."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
THREADS, CHUNK = 32, 512
"""A thread asks for `CHUNK` files at a time."""


def file_sizes(paths: Sequence[Path]) -> IntArray:
    """Bytes of each file, int64 [n]; -1 where there is no regular file."""
    sizes = np.empty(len(paths), dtype=np.int64)

    def ask(start: int) -> None:
        sizes[start : start + CHUNK] = [_size(path) for path in paths[start : start + CHUNK]]

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(ask, range(0, len(paths), CHUNK)))
    return sizes


def _size(path: Path) -> int:
    try:
        found = os.stat(path)  # noqa: PTH116 (a million paths: half the time of Path.stat)
    except OSError:
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1
