"""RUN_DIR/tracking/NAME.json: which record a run has at a tracker, and what has been told there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..files import write_atomically
from ..metric_file import OF_TRAINING, Event

FOLDER = "tracking"


@dataclass
class State:
    """What a tracker has been told. Reset when it begins a new record."""

    id: str | None = None
    at: str | None = None
    """Where the record is, such as the address of a server."""
    time: float = 0.0
    """Of the newest event told, as metrics.jsonl has it."""
    steps: dict[str, int] = field(default_factory=dict)
    """Kind of event -> last step told, for events of training."""
    rows: int = 0
    """Number of events told."""
    files: dict[str, int] = field(default_factory=dict)
    """Path in the run folder -> time of its last change, in ns, when it was sent."""

    def is_told(self, event: Event, *, is_appended: bool) -> bool:
        """Steps that a resumed run trains again are not told again: they are the same.

        is_appended: the event was written while this process followed the file, so it is new if it is not of
        training.
        """
        if event["event"] in OF_TRAINING:
            return bool(event["step"] <= self.steps.get(event["event"], -1))
        return not is_appended and float(event.get("time", 0.0)) <= self.time

    def add(self, event: Event) -> None:
        if event["event"] in OF_TRAINING:
            self.steps[event["event"]] = max(event["step"], self.steps.get(event["event"], -1))
        self.time = max(self.time, float(event.get("time", 0.0)))
        self.rows += 1

    def begin(self, id: str, at: str) -> None:
        """Forget what another record was told."""
        self.id, self.at, self.time, self.rows = id, at, 0.0, 0
        self.steps, self.files = {}, {}


def state_path(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{name}.json"


def read_state(folder: Path, name: str) -> State:
    """A new one where there is none, or none that can be read."""
    try:
        return State(**json.loads(state_path(folder, name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return State()


def write_state(folder: Path, name: str, state: State) -> None:
    """Raises OSError."""
    (folder / FOLDER).mkdir(exist_ok=True)
    write_atomically(state_path(folder, name), json.dumps(asdict(state), indent=1) + "\n", durable=False)
