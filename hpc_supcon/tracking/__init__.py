"""Trackers: services that hold the records of many runs. Each one is told by a process of its own.

That process follows the run folder, so no tracker can stop or slow training: it reads what training writes
(metrics.jsonl and the files of the stages), and keeps in RUN_DIR/tracking/NAME.json what it has told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..config import Config
from ..errors import MissingExtra
from .record import Tell, Tracker
from .state import State


@dataclass(frozen=True)
class TrackerSpec:
    package: str
    """The module that is imported."""
    open: Callable[[Path, Config, State, Tell], Tracker]
    """Continues the record `state.id` of a run folder, or begins one and sets `state.id`."""


def _open_wandb(folder: Path, config: Config, state: State, tell: Tell) -> Tracker:
    from .wandb_run import WandbRun

    return WandbRun(folder, config, state, tell)


def _open_mlflow(folder: Path, config: Config, state: State, tell: Tell) -> Tracker:
    from .mlflow_run import MlflowRun

    return MlflowRun(folder, config, state, tell)


TRACKERS: dict[str, TrackerSpec] = {
    "wandb": TrackerSpec("wandb", _open_wandb),
    "mlflow": TrackerSpec("mlflow", _open_mlflow),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise MissingExtra where the package of a tracker is not installed. Imports none of them."""
    for name in names:
        spec = find_spec(TRACKERS[name].package)
        if spec is None or spec.origin is None:  # a folder of that name, such as ./wandb, is no package
            raise MissingExtra(
                f"log.to={name} needs the package {TRACKERS[name].package}: pip install 'hpc-supcon[{name}]'"
            )
