"""stdout and stderr that are closed, or whose reader or disk is gone: a command does its work all the same."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class SafeStream:
    """A text stream whose write and flush never raise OSError: `error` is the first one, if any."""

    def __init__(self, stream: TextIO, error: OSError | None = None) -> None:
        """error: set where nothing arrives that is written to `stream`."""
        self._stream, self._lost = stream, error
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            written = self._stream.write(text)
        except OSError as error:
            self.error = self.error or error
            return len(text)
        if text:
            self.error = self.error or self._lost
        return written

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.error = self.error or error

    def discard(self) -> None:
        """Drop what could not be written: Python would try again when the process ends, and exit with 120."""
        try:
            number = self._stream.fileno()
        except (OSError, ValueError):  # not a file
            return
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, number)
        os.close(handle)
        self.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_streams() -> Iterator[SafeStream]:
    """Inside, sys.stdout and sys.stderr are SafeStreams; yields that of stdout.

    Descriptors 0 to 2 that are closed become /dev/null: otherwise the next file or socket would get their number, and
    whatever a library prints would be written into it.
    """
    before = sys.stdout, sys.stderr
    out, err = _safe(1, sys.stdout), _safe(2, sys.stderr)
    _open(0, os.O_RDONLY)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        for stream in (out, err):
            stream.flush()
            if stream.error is not None:
                stream.discard()
        sys.stdout, sys.stderr = before


def _safe(number: int, stream: TextIO | None) -> SafeStream:
    is_closed = _open(number, os.O_WRONLY)
    if stream is not None and not is_closed:
        return SafeStream(stream)
    lost = OSError(errno.EBADF, "it is closed")
    # not the descriptor, which a file may have by now that was opened before
    return SafeStream(open(os.devnull, "w", encoding="utf-8"), lost)  # noqa: PTH123


def _open(number: int, mode: int) -> bool:
    """Open /dev/null as this descriptor, if it is closed; whether it was."""
    try:
        os.fstat(number)
    except OSError:
        handle = os.open(os.devnull, mode)
        if handle != number:
            os.dup2(handle, number)
            os.close(handle)
        return True
    return False
