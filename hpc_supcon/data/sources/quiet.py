"""Keeps what Pillow and its libraries say about odd files from the terminal: an error names the file already."""

from __future__ import annotations

import ctypes
import logging
import re
import warnings
from functools import lru_cache
from pathlib import Path

_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
"""An entry of warnings.filters."""


def silence_pillow() -> None:
    """Call it before Pillow opens a file; takes a microsecond.

    The filter of warnings is set for good: one around each call would be seen by all threads, and end in the middle
    of other calls. It is set again where others were put before it.
    """
    if list(warnings.filters[:1]) != [_FILTER]:
        warnings.filterwarnings("ignore", module=_FILTER[3].pattern)
    _once()


@lru_cache(maxsize=1)
def _once() -> None:
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # without any handler, errors go to stderr
    maps = Path("/proc/self/maps")
    loaded = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    for library in sorted(path for path in loaded if path.startswith("/") and "libtiff" in Path(path).name):
        tiff = ctypes.CDLL(library)
        for set_handler in (tiff.TIFFSetErrorHandler, tiff.TIFFSetWarningHandler):
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)  # libtiff writes to stderr itself
