"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError


def check_free(path: Path, *, force: bool) -> None:
    """Raise OutputError unless `path` may be written: before the work, not after it."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give a file name with -o")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already; choose another name with -o, or replace it with --force")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} does not exist: make the folder first, or choose another with -o")


@contextmanager
def whole_file(path: Path, *, force: bool) -> Iterator[Path]:
    """A path beside `path` to write to. When the block ends well it is flushed to disk and renamed, otherwise
    removed. Raises OutputError, also for an OSError of the block."""
    check_free(path, force=force)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
