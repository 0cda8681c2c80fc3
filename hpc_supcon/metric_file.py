"""metrics.jsonl: one JSON line for each event. A kill may tear its last line, and its disk may be full.

Whoever reads it passes over lines that are not whole; they are moved to metrics.jsonl.torn when the file is next
opened for writing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .files import write_atomically

METRICS, TORN = "metrics.jsonl", "metrics.jsonl.torn"
OF_TRAINING = ("train", "validation", "collapsed", "stopped", "profile")
"""Events of training steps: those of steps that are trained again are told again. Others are of a process's life, or
of a probe, which counts its own iterations."""
AFTER_VALIDATION = ("validation", "stopped")
MAX_WAITING = 16 << 20
"""Bytes that wait in memory for a disk that fails."""

Warn = Callable[[str], None]
Event = dict[str, Any]


def read_events(path: Path) -> list[Event]:
    """The events of a metrics.jsonl, without lines that are not whole. Raises OSError."""
    return [event for line in path.read_bytes().split(b"\n") if (event := parse_event(line)) is not None]


def parse_event(line: bytes) -> Event | None:
    """None for a line that is empty, torn, or not of metrics."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_event = isinstance(event, dict) and isinstance(event.get("event"), str)
    return event if is_event and isinstance(event.get("step"), int) else None


def rewind(path: Path, step: int, warn: Warn, *, validated: int | None = None) -> None:
    """Remove the events of training that a run which goes on from `step` tells again; set torn lines aside.

    validated: the last step whose validation the run does not do again, by default `step`. The file is the old or the
    new one at every moment; one that cannot be changed is left as it is, which `warn` is told.
    """
    validated = step if validated is None else validated

    def is_told_again(event: Event) -> bool:
        last = validated if event["event"] in AFTER_VALIDATION else step
        return event["event"] in OF_TRAINING and event["step"] > last

    try:
        old = path.read_bytes() if path.exists() else b""
        lines = [line for line in old.split(b"\n") if line]
        events = [parse_event(line) for line in lines]
        new = b"".join(
            line + b"\n"
            for line, event in zip(lines, events, strict=True)
            if event is not None and not is_told_again(event)
        )
        torn = [line for line, event in zip(lines, events, strict=True) if event is None]
        if torn:
            _set_aside(path, torn, warn)
        if new != old:
            write_atomically(path, new)
    except OSError as error:
        warn(f"{path}: left as it is, with the steps after {step}: {error.strerror}")


def end_line(path: Path, warn: Warn) -> None:
    """Set a torn last line aside, so that the next line begins a new one. Raises OSError."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        last = file.read().rpartition(b"\n")[2]
        if not last:
            return
        if parse_event(last) is None:
            _set_aside(path, [last], warn)
            file.truncate(file.tell() - len(last))
        else:
            file.write(b"\n")


def _set_aside(path: Path, torn: list[bytes], warn: Warn) -> None:
    warn(f"{path}: {len(torn)} torn line{'s' if len(torn) > 1 else ''} moved to {TORN}")
    with (path.parent / TORN).open("ab") as file:
        file.write(b"".join(line + b"\n" for line in torn))


class AppendedLines:
    """Appends lines to a file. What cannot be written waits in memory and is written as soon as that works again.

    `warn` is told once that the file cannot be written, and in the end how many lines are missing.
    """

    def __init__(self, path: Path, warn: Warn) -> None:
        self._path, self._warn, self._handle, self._is_begun = path, warn, -1, False
        self._waiting, self._missing, self._is_told = b"", 0, False

    def write(self, line: str) -> None:
        """`line`: without its end."""
        if len(self._waiting) < MAX_WAITING:
            self._waiting += line.encode() + b"\n"
        else:
            self._missing += 1
        self._flush()

    def _flush(self) -> None:
        try:
            if not self._is_begun:
                end_line(self._path, self._warn)
                self._is_begun = True
            if self._handle < 0:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._handle = os.open(self._path, flags, 0o666)
            while self._waiting:  # a disk that fills up takes a part
                self._waiting = self._waiting[os.write(self._handle, self._waiting) :]
        except OSError as error:
            self._close_handle()  # a file system that was mounted again has another handle
            if not self._is_told:
                self._is_told = True
                self._warn(
                    f"{self._path}: not written: {error.strerror}; the run goes on, and every event tries again"
                )

    def _close_handle(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            with suppress(OSError):  # told already
                os.close(handle)

    def close(self) -> None:
        if self._waiting:
            self._flush()
        missing = self._missing + self._waiting.count(b"\n")
        if missing:
            self._warn(f"{self._path}: {missing} events are missing")
        self._waiting = b""
        self._close_handle()
