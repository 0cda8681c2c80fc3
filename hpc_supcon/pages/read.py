"""What a run folder holds, as far as it can be read: what is damaged becomes a notice, not an error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import run_folder
from ..config import flatten_data, yaml12
from ..errors import ConfigError, RunFolderError, printable
from ..metric_file import METRICS, Event, read_events

LATER = ("run_dir", "name")
"""Settings that say where a run is, not what it does."""


@dataclass
class Run:
    """One run folder. `config`: `section.key` -> value; `notices`: what could not be read, one line each."""

    folder: Path
    label: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    """state.json of the newest checkpoint."""
    notices: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.name)

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def start(self) -> Event:
        """The first event "start", {} of a run that trained nothing."""
        return next((event for event in self.events if event["event"] == "start"), {})

    @property
    def loss(self) -> str:
        """As LossConfig.label, for a configuration that this version may not accept."""
        terms = {k.removeprefix("loss.terms."): v for k, v in self.config.items() if k.startswith("loss.terms.")}
        if not terms:
            return str(self.config.get("loss.name", ""))
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in terms.items())

    @property
    def data(self) -> str:
        return str(self.config.get("data.source", ""))

    @property
    def is_unlabeled(self) -> bool:
        return self.config.get("data.labels") == "none"

    @property
    def test_set(self) -> tuple[str, ...]:
        """By which test images and labels can be told from those of other runs: empty where that is unknown."""
        split = mapping(mapping(self.checkpoint.get("data")).get("splits")).get("test")
        return tuple(str(mapping(split).get(key, "")) for key in ("labels", "content", "names", "sizes"))

    @property
    def state(self) -> str:
        """`finished`, `training`, `preempted`, or `not trained`: what its events tell."""
        kinds = [event["event"] for event in self.events]
        if not kinds:
            return "evaluated" if self.results else "not started"
        last = max((i for i, kind in enumerate(kinds) if kind in ("start", "end", "preempted")), default=-1)
        return {"start": "not finished", "end": "finished", "preempted": "preempted"}.get(
            kinds[last] if last >= 0 else "", "evaluated"
        )


def read_run(folder: Path) -> Run:
    """Raises RunFolderError for a folder that is not one of a run; everything else is a notice."""
    if (folder / "grid.json").is_file():
        raise RunFolderError(f"{folder}: is the folder of a grid: hpc-supcon grid report --html {folder}")
    run_folder.check_is_run(folder)
    run = Run(folder)
    try:
        text = (folder / run_folder.CONFIG).read_text(encoding="utf-8")
        run.config = flatten_data(mapping(yaml12.loads(text, str(folder / run_folder.CONFIG))))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        run.notices.append(_told(error, folder / run_folder.CONFIG))
    try:
        run.events = read_events(folder / METRICS)
    except FileNotFoundError:
        pass
    except OSError as error:
        run.notices.append(_told(error, folder / METRICS))
    for name, read in (("results", run_folder.read_results), ("scores", run_folder.read_scores)):
        try:
            setattr(run, name, read(folder))
        except RunFolderError as error:
            run.notices.append(str(error))
    run.checkpoint = _newest_state(run)
    return run


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """One run for each folder, labeled so that no two have the same label. Raises RunFolderError."""
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (twice := seen.setdefault(folder.resolve(), folder)) is not folder:
            raise RunFolderError(f"{folder}: given twice{'' if twice == folder else f', also as {twice}'}")
    runs = [read_run(folder) for folder in folders]
    for label in (lambda r: r.name, lambda r: r.folder.resolve().name, lambda r: str(r.folder)):
        labels = [label(run) for run in runs]
        if len(set(labels)) == len(labels):
            break
    for run, text in zip(runs, labels, strict=True):
        run.label = printable(text)
    return runs


def _newest_state(run: Run) -> dict[str, Any]:
    """state.json of the newest checkpoint, {} where there is none; not verified, for nothing depends on it."""
    folder = run.folder / run_folder.CHECKPOINTS
    steps = {int(p.name[5:]): p for p in folder.glob("step-*") if p.name[5:].isdecimal()} if folder.is_dir() else {}
    for step in sorted(steps, reverse=True):
        try:
            return mapping(json.loads((steps[step] / "state.json").read_bytes()))
        except FileNotFoundError:
            continue  # deleted by the running job
        except (OSError, ValueError, RecursionError) as error:
            run.notices.append(_told(error, steps[step] / "state.json"))
    return {}


def _told(error: Exception, path: Path) -> str:
    reason = error.strerror if isinstance(error, OSError) else "damaged"
    return str(error) if isinstance(error, ConfigError) else f"{path}: cannot be read: {reason}"


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping with text as keys, else {}."""
    return value if isinstance(value, dict) and all(isinstance(key, str) for key in value) else {}


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def numbers(values: Any) -> list[float | None]:
    return [number(value) for value in values] if isinstance(values, list) else []


def texts(values: Any) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list) else []


def interval_of(value: Any) -> tuple[float, float] | None:
    """[low, high] if both are finite numbers."""
    found = numbers(value)
    return (found[0], found[1]) if len(found) == 2 and found[0] is not None and found[1] is not None else None


def settings_that_differ(runs: Iterable[Run], ignored: Iterable[str] = LATER) -> list[str]:
    """The settings that do not have the same value in all runs, in the order of the configuration."""
    configs = [run.config for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    left_out = set(ignored)
    return [k for k in keys if k not in left_out and any(config.get(k) != configs[0].get(k) for config in configs)]
