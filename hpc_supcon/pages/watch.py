"""A page that follows runs while they train."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .maps import FOLDER
from .page import render, write_page
from .runs import PAGE, page_of_runs

INTERVAL_S = 5
"""Seconds between two looks at the run folders, and after which the page is read again."""


def watch(folders: Sequence[Path], out: Path, wait: Callable[[float], None] = time.sleep) -> None:
    """Write the page again whenever one of its files has changed, until Ctrl-C. Raises as page_of_runs does."""
    seen: object = None
    try:
        while True:
            changed = [_times(folder) for folder in folders]
            if changed != seen:
                write_page(out, render(page_of_runs(folders), refresh_s=INTERVAL_S))
                seen = changed
            wait(INTERVAL_S)
    except KeyboardInterrupt:
        # without this, a page that is left behind would be read again and again
        write_page(out, render(page_of_runs(folders)))


def _times(folder: Path) -> dict[str, tuple[int, int]]:
    """Time and size of every file that a page reads, but the page itself."""
    found = {}
    for path in [*folder.glob("*"), *(folder / FOLDER).glob("*")]:
        if path.name == PAGE or path.name.startswith("."):
            continue
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # replaced at this moment
        found[str(path)] = (status.st_mtime_ns, status.st_size)
    return found
