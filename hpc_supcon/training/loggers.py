"""Where the numbers of a run go besides metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError, HpcSupconError, PartError, unknown_name
from ..parts import Part, find, run
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


class OwnLogger:
    """A logger of a user's own: what it raises is told once, and it gets nothing more."""

    def __init__(self, part: Part, folder: Path, resumed_at: int | None) -> None:
        """The part is called with folder (the run's), and resumed_at (the step from which a run goes on, or None);
        what it returns has the methods of Logger. Raises PartError."""
        self._where = part.where
        self._logger: Any = part.build(folder=folder, resumed_at=resumed_at)
        for name in ("write", "close"):
            if not callable(getattr(self._logger, name, None)):
                raise PartError(f"{part.where}: returned {type(self._logger).__name__}, which has no method {name}")

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        self._call("write", event, step, values)

    def close(self) -> None:
        self._call("close")

    def _call(self, name: str, *arguments: Any) -> None:
        if self._logger is None:
            return
        try:
            run(self._where, getattr(self._logger, name), *arguments)
        except HpcSupconError as error:
            self._logger = None
            warn(f"{error}; the run goes on without this logger")


def open_logger(name: str, folder: Path, resumed_at: int | None) -> Logger | None:
    """The logger of that name for a run folder, of LOGGERS or of a user's own; None for a tracker. Raises
    ConfigError, CodeNotAllowed."""
    if (own := find("loggers", name, LOGGERS)) is not None:
        return OwnLogger(own, folder, resumed_at)
    if name not in LOGGERS:
        raise ConfigError(unknown_name("log.to", name, LOGGERS))
    found = LOGGERS[name]
    return None if found is None else found(folder, resumed_at)
