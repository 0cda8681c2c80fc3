"""What a tracker receives: the events of metrics.jsonl as flat numbers and texts, results, and files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..metric_file import Event
from ..run_folder import CHECKPOINTS, CONFIG, RESULTS, SCORES

Tell = Callable[[str], None]
LABELS = ("probe", "space", "data")
"""Values of an event that say what its numbers are of: they become part of the names."""
RECORDS = (CONFIG, RESULTS, SCORES, "metrics.jsonl")
PICTURES = ("plots/*.png", "embeddings/overview.png", "embeddings/neighbors.png")
PAGE = "report.html"


@dataclass(frozen=True)
class Row:
    """One event."""

    kind: str
    """As `train`, or `embedding/encoder` where numbers of several things have the same names."""
    step: int
    time: float
    """Unix time in s."""
    numbers: dict[str, float]
    """`kind/name` -> value."""
    texts: dict[str, str]


class Tracker(Protocol):
    """A record of a run. Methods may raise anything, and are then called again later with the same."""

    def log(self, rows: Sequence[Row]) -> None: ...

    def results(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """The entries of results.json, in place of earlier ones."""

    def file(self, kind: str, name: str, path: Path) -> None:
        """kind: record | page | picture | checkpoint (a folder). name: its path in the run folder."""

    def close(self, *, finished: bool) -> None:
        """Returns once all is sent. finished: False where the run will go on."""


def row_of(event: Event) -> Row:
    labels = [_safe(event[name]) for name in LABELS if isinstance(event.get(name), str)]
    kind = "/".join([event["event"], *labels])
    left = {name: value for name, value in event.items() if name not in ("event", "step", "time", *LABELS)}
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for name, value in flat(left):
        if isinstance(value, (int, float)):
            numbers[f"{kind}/{name}"] = float(value)
        elif isinstance(value, str):
            texts[f"{kind}/{name}"] = value
    return Row(kind, event["step"], float(event.get("time", 0.0)), numbers, texts)


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`a/b/c`, value) of nested mappings; lists are left out, since no tracker draws them."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{_safe(name)}/")
        elif not isinstance(value, list):
            yield f"{prefix}{_safe(name)}", value


def _safe(name: object) -> str:
    """A part of a name, of characters that all trackers take."""
    return re.sub(r"[^\w\-.]", "_", str(name))


def entry_name(entry: Mapping[str, Any]) -> str:
    """How an entry of results.json is called in a record: `linear`, or `linear/pruned_l1-0.5`."""
    parts = [entry.get("probe") or entry.get("stage", ""), entry.get("folder")]
    return "/".join(_safe(part) for part in parts if part)


def files_of(folder: Path, artifacts: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """(kind, path) of the files that a record holds besides numbers."""
    yield from (("record", path) for name in RECORDS if (path := folder / name).is_file())
    if "pictures" in artifacts:
        for pattern in PICTURES:
            yield from (("picture", path) for path in sorted(folder.glob(pattern)))
    if "page" in artifacts and (folder / PAGE).is_file():
        yield "page", folder / PAGE
    if "checkpoints" in artifacts:
        yield from (("checkpoint", path) for path in sorted((folder / CHECKPOINTS).glob("step-*")) if path.is_dir())
