"""Files that are complete or absent, and folders that are their owner's alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError, RunFolderError


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace `path` by a file with this content (text as UTF-8). Raises OSError; `path` is then as it was.

    durable: survives a power cut once this returns, for some milliseconds of waiting; False for files that can be
    made again.
    """
    payload = content.encode() if isinstance(content, str) else content
    with atomic_path(path, durable=durable) as partial:
        partial.write_bytes(payload)


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to: renamed to it when the block ends normally, otherwise removed.

    durable: as for `write_atomically`. Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        if durable:
            _sync(partial)
        partial.replace(path)
        if durable:
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Flush a folder's own entries: a rename survives a power cut only after this. Raises OSError."""
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_output(path: Path, *, force: bool) -> None:
    """Raise OutputError unless `path` may be written: before the work, not after it."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give a file name with -o")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already; choose another name with -o, or replace it with --force")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} does not exist: make the folder first, or choose another with -o")


@contextmanager
def output_file(path: Path, *, force: bool) -> Iterator[Path]:
    """`atomic_path` for a file that the user named. Raises OutputError, also for an OSError of the block."""
    check_output(path, force=force)
    try:
        with atomic_path(path) as partial:
            yield partial
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def private_folder(path: Path) -> Path:
    """`path`, a folder that only its owner may read or write (0700), made where it is missing.

    For what is executed when it is read back, such as the pickles of a job launcher. Raises RunFolderError when it
    belongs to somebody else, is a link, or others may write in it: what lies there could be theirs.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be made: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise RunFolderError(f"{path}: is not a folder, or a link to one; remove it, or choose another folder")
    if found.st_uid != os.geteuid():
        raise RunFolderError(f"{path}: belongs to user {found.st_uid}, who could put code there; choose another")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RunFolderError(
            f"{path}: others may write there (mode {stat.S_IMODE(found.st_mode):o}), and what is there is executed; "
            "look through it, then chmod 700, or choose another folder"
        )
    return path
