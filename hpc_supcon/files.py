"""Names of files as they are printed, atomic writing of files, and folders that only their owner can access."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError, RunFolderError


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace `path` by a file with this content (text as UTF-8). Raises OSError; `path` is then unchanged.

    durable: the file survives a power failure once this returns, which takes some milliseconds; False for files that
    can be written again.
    """
    payload = content.encode() if isinstance(content, str) else content
    with atomic_path(path, durable=durable) as partial:
        partial.write_bytes(payload)


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` to write to: renamed to `path` after the block, or removed where that raises.

    `path` is the old file or the new one at every moment, also for other threads, processes and machines that read
    or write it. durable: as for `write_atomically`. Raises OSError, which names a file.
    """
    # random, not the process id: on a shared file system, writers on two machines may have the same one
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        yield partial
        if durable:
            _sync(partial)
        partial.replace(path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:  # as that of a write to a full disk
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder beside `path` to write files into: renamed to `path` after the block, or removed if that raises.

    replace: a folder that is there already makes room, and is removed afterwards; else there must be none, or an
    empty one. Raises OSError, which names a file.
    """
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        yield partial
        for written in partial.rglob("*"):
            _sync(written)
        sync_folder(partial)
        if replace and path.is_dir():
            old = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder: a rename survives a power failure only after this. Raises OSError."""
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_threads = threading.Lock()


@contextmanager
def file_lock(path: Path, *, wait_s: float = 60.0) -> Iterator[None]:
    """Inside, no other process or thread is inside for the same `path`: a file for this purpose, made if missing.

    For reading, changing and writing another file, which takes milliseconds. On a file system without locks only
    threads exclude each other. Raises OSError (TimeoutError after wait_s).
    """
    with _threads, path.open("ab") as file:  # a POSIX lock belongs to the process: see run_lock.py
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in NO_LOCKS:
                    break
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                if time.monotonic() > until:
                    raise TimeoutError(errno.ETIMEDOUT, f"locked by another process for {wait_s:g} s") from None
                time.sleep(0.01)
        yield


NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""Errors of a file system without locks."""


def check_output(path: Path, *, force: bool) -> None:
    """Raise OutputError unless the file `path` can be created, or replaced with `force`; call it before the work."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give a file name with -o")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already; choose another name with -o, or replace it with --force")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} does not exist: make the folder first, or choose another with -o")


@contextmanager
def output_file(path: Path, *, force: bool) -> Iterator[Path]:
    """`atomic_path` for a file that the user named. Raises OutputError, also for an OSError in the block."""
    check_output(path, force=force)
    try:
        with atomic_path(path) as partial:
            yield partial
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def private_folder(path: Path) -> Path:
    """Create the folder `path` for its owner alone (mode 0700) unless it exists; returns `path`.

    For files that are executed when they are read back, such as the pickles of a job launcher. Raises
    RunFolderError when it is a link, belongs to another user, or others can write there: the files could be theirs.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be created: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise RunFolderError(f"{path}: is a link or not a folder; remove it, or choose another folder")
    if found.st_uid != os.geteuid():
        raise RunFolderError(f"{path}: belongs to user {found.st_uid}, who could put code there; choose another")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RunFolderError(
            f"{path}: others can write there (mode {stat.S_IMODE(found.st_mode):o}), and its files are executed; "
            "check them, then chmod 700, or choose another folder"
        )
    return path
