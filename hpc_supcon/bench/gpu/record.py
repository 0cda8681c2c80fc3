"""The file with the numbers of one stage: rewritten after each of them, so that a kill loses none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import OutputError
from ...files import write_atomically

RUNNING, DONE, FAILED, TOO_SLOW, NO_TIME = "running", "done", "failed", "too slow", "no time"
"""A stage that runs, or was cut off with the whole command; that measured all; that ended with an error; that was
killed at its limit; that was not started."""


class Record:
    """A stage's numbers: `facts` by name, and rows of `tables`; what was skipped and what failed, with the reason.

    Raises OutputError where the file cannot be written.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self._path, self.content = path, content

    @classmethod
    def start(cls, path: Path, stage: str, device: str, limit_s: float) -> Record:
        """A new file, in place of an older one."""
        content = {
            "stage": stage, "device": device, "status": RUNNING, "seconds": 0.0, "limit_s": round(limit_s, 1),
            "facts": {}, "tables": {}, "skipped": [], "failures": [],
        }  # fmt: skip
        record = cls(path, content)
        record.write()
        return record

    @classmethod
    def load(cls, path: Path) -> Record:
        """The file as it is."""
        return cls(path, read(path))

    def fact(self, **facts: Any) -> None:
        self.content["facts"] |= facts
        self.write()

    def row(self, table: str, **row: Any) -> None:
        self.content["tables"].setdefault(table, []).append(row)
        self.write()

    def skip(self, what: str, why: str) -> None:
        self.content["skipped"].append({"what": what, "why": why})
        self.write()

    def fail(self, what: str, error: str) -> None:
        self.content["failures"].append({"what": what, "error": error})
        self.write()

    def end(self, status: str, seconds: float, **more: Any) -> None:
        self.content |= {"status": status, "seconds": round(seconds, 1), **more}
        self.write()

    def write(self) -> None:
        try:
            write_atomically(self._path, json.dumps(self.content, indent=1) + "\n", durable=False)
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written: {error.strerror or error}") from None


def read(path: Path) -> dict[str, Any]:
    """The content of a stage's file. Raises OutputError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read as numbers of a stage ({error}); remove it") from None
    if not isinstance(content, Mapping) or "stage" not in content:
        raise OutputError(f"{path}: is no file with numbers of a stage; choose another --out")
    return dict(content)
