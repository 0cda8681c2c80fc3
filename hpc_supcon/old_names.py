"""Whoever uses an old name is told its new one, once, by one process of a run.

A command prints a line to stderr; for Python users it is a DeprecationWarning at their own line.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .environment import is_first_rank

_told: set[str] = set()
_printers: list[Callable[[str], None]] = []


def warn_old_name(old: str, new: str, gone_in: str, where: str) -> None:
    """Say that `old` is now called `new`, once for each name in a process, on rank 0 alone.

    where: who gave the old name, such as a file. gone_in: the version that no longer reads it.
    """
    if old in _told or not is_first_rank():
        return
    _told.add(old)
    line = f"{where}: {old} is now called {new}; version {gone_in} will no longer read the old name"
    if _printers:
        _printers[-1](line)
    else:
        warnings.warn(line, DeprecationWarning, stacklevel=_level_of_user())


@contextmanager
def printed(printer: Callable[[str], None]) -> Iterator[None]:
    """Inside, which is one command, these lines go to `printer` and not to Python's warnings."""
    before = set(_told)
    _told.clear()
    _printers.append(printer)
    try:
        yield
    finally:
        _printers.pop()
        _told.clear()
        _told.update(before)


def _level_of_user() -> int:
    """The stacklevel, for the function that calls this, of the first line that is not of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    return level
