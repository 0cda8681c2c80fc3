"""metrics-KIND.csv: the numbers of metrics.jsonl as tables, one for each kind of event."""

from __future__ import annotations

import csv
import errno
import io
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..metric_file import METRICS, Event, read_events
from ..tracking.record import flat

RETRY_S = 60.0


class CsvFiles:
    """Appends a row for each event.

    A file is made again from metrics.jsonl when a process first writes to it, when an event has a value that none
    before had, and after the disk has failed: no line stays torn, and no step is there twice.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._columns: dict[str, list[str]] = {}
        self._retry_at, self._is_told = 0.0, False
        for kind in dict.fromkeys(event["event"] for event in self._events()):
            self._make(kind)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Call after the event is in metrics.jsonl."""
        row = {"step": step, **dict(flat(values))}
        columns = self._columns.get(event)
        if columns is None or not row.keys() - {"event"} <= set(columns):
            self._make(event)
            return
        path = self._path(event)
        try:
            line = _text([row], columns, header=False).encode()
            with path.open("ab", buffering=0) as file:
                if file.write(line) != len(line):  # a disk that fills up takes a part
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._failed(event, error)

    def close(self) -> None:
        """Files that failed are tried once more."""
        self._retry_at = 0.0
        for kind in dict.fromkeys(event["event"] for event in self._events()):
            if kind not in self._columns:
                self._make(kind)

    def _make(self, kind: str) -> None:
        if time.monotonic() < self._retry_at:
            return
        rows = [dict(flat(event)) for event in self._events() if event["event"] == kind]
        columns = list(dict.fromkeys(name for row in rows for name in row if name != "event"))
        try:
            write_atomically(self._path(kind), _text(rows, columns, header=True), durable=False)
        except OSError as error:
            self._failed(kind, error)
        else:
            self._columns[kind] = columns

    def _events(self) -> list[Event]:
        try:
            return read_events(self._folder / METRICS)
        except OSError:
            return []  # which is told where it is written

    def _path(self, kind: str) -> Path:
        return self._folder / f"metrics-{re.sub('[^A-Za-z0-9_-]', '-', kind)}.csv"

    def _failed(self, kind: str, error: OSError) -> None:
        self._columns.pop(kind, None)
        self._retry_at = time.monotonic() + RETRY_S
        if not self._is_told:
            self._is_told = True
            self._warn(
                f"{self._path(kind)}: not written: {error.strerror}; the run goes on, and tries again every "
                f"{RETRY_S:g} s"
            )


def _text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, header: bool) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows([{name: row.get(name) for name in columns} for row in rows])
    return out.getvalue()
