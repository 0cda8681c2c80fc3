"""Where the numbers of a run go besides metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..terminal import warn
from ..tracking import TRACKERS
from .csv_files import CsvFiles
from .tensorboard import TensorBoard


class Logger(Protocol):
    """Takes events as metrics.jsonl does. What fails is told once, and never raised."""

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def _tensorboard(folder: Path, resumed_at: int | None) -> Logger:
    return TensorBoard(folder / "tensorboard", warn, purge_step=None if resumed_at is None else resumed_at + 1)


def _csv(folder: Path, resumed_at: int | None) -> Logger:
    return CsvFiles(folder, warn)


LOGGERS: dict[str, Callable[[Path, int | None], Logger] | None] = {
    "tensorboard": _tensorboard,
    "csv": _csv,
    **dict.fromkeys(TRACKERS),
}
"""Name in `log.to` -> what opens it in a run folder, given the step from which a run resumes; None for a tracker,
which a process of its own tells (see tracking)."""
