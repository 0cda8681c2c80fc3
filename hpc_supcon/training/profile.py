"""Where the time of a training step goes: measured over some steps of a run, printed, logged, and traced.

Measuring changes no result: a run with `train.profile` ends with the same weights as one without.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from rich.table import Table

from ..models import PretrainingModel
from ..phases import BACKWARD, ENCODER, LOSS, PROJECTION, REST, Clock, measured_by
from ..terminal import warn

WARM_UP, TRACED = 5, 3
"""Steps before the measured ones (allocations, compilation, tuning), and after them for the profiler's trace."""
ORDER = ("data", "views", ENCODER, PROJECTION, "gather", LOSS, "optimizer", "finite check", "queue", "pruning", REST)
"""Order of the printed rows."""
OUTSIDE = ("validation", "checkpoint")
"""Phases of the training loop that do not belong to a step."""
MEANING = {
    "data": "waiting for the loader",
    "views": "random parameters and rendering",
    PROJECTION: "and other heads",
    "gather": "collectives of the loss, and waiting for other ranks",
    "optimizer": "gradient norm and update",
    "finite check": "for NaN and Inf",
    "pruning": "new masks, where they are due",
    REST: "logging, Python",
}


@dataclass(frozen=True)
class Breakdown:
    """Seconds of each phase per step, averaged over `steps` steps. The phases add up to `total`, without gaps."""

    seconds: dict[str, float]
    steps: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def both(self, name: str) -> float:
        """Seconds per step of a phase, forward and backward together."""
        return self.seconds.get(name, 0.0) + self.seconds.get(name + BACKWARD, 0.0)

    def share(self, name: str) -> float:
        """Share of a phase in the step's time, forward and backward together: 0..1."""
        return self.both(name) / self.total

    def names(self) -> list[str]:
        """Phases that ran, in the order of the table."""
        known = {name.removesuffix(BACKWARD) for name in self.seconds}
        return [name for name in ORDER if name in known] + sorted(known - set(ORDER))

    def numbers(self) -> dict[str, float]:
        """For the log: ms per step of every phase, and of all together."""
        named = {f"{name.replace(' ', '_')}_ms": round(1e3 * s, 4) for name, s in self.seconds.items()}
        return {"step_ms": round(1e3 * self.total, 4), **named}

    def table(self) -> Table:
        title = f"a step: {1e3 * self.total:.2f} ms, mean of {self.steps} steps"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for heading in ("phase", "forward ms", "backward ms", "ms", "share"):
            table.add_column(heading, justify="left" if heading == "phase" else "right")
        table.add_column("")
        for name in self.names():
            forward, backward = (1e3 * self.seconds.get(name + end, 0.0) for end in ("", BACKWARD))
            parts = (f"{forward:.2f}", f"{backward:.2f}") if backward else ("", "")
            meaning = MEANING.get(name, "")
            table.add_row(name, *parts, f"{forward + backward:.2f}", f"{self.share(name):.1%}", meaning)
        return table


def breakdown(clock: Clock, steps: int) -> Breakdown:
    """The breakdown of the `steps` steps that the clock has measured. Waits for the device."""
    seconds = {name: total / steps for name, total in clock.read().items() if name not in OUTSIDE}
    return Breakdown(seconds, steps)


class StepProfile:
    """Measures `steps` training steps after WARM_UP others, calls `report`, and then traces TRACED more.

    Every rank has one and calls `step` after each training step; the one with a `folder` measures, and writes the
    trace there (Chrome's format, gzipped: chrome://tracing or ui.perfetto.dev). A run that ends early has no trace.
    """

    def __init__(
        self,
        steps: int,
        model: PretrainingModel,
        device: torch.device,
        folder: Path | None,
        report: Callable[[Breakdown], None],
    ) -> None:
        self._wanted, self._model, self._device = steps, model, device
        self._folder, self._report = folder, report
        self._done = 0
        self._clock: Clock | None = None
        self._trace: torch.profiler.profile | None = None
        self._open = ExitStack()

    def step(self) -> None:
        """Call after each training step. A trace that cannot be written is told, and missing."""
        self._done += 1
        if self._done == WARM_UP and self._folder is not None:
            self._clock = Clock(self._device)
            self._open.enter_context(measured_by(self._clock, self._model))
        if self._done == WARM_UP + self._wanted and self._folder is not None:
            self._finish_clock(self._wanted)
            self._start_trace()
        if self._done == WARM_UP + self._wanted + TRACED:
            self._write_trace()

    def _finish_clock(self, steps: int) -> None:
        if self._clock is not None:
            self._report(breakdown(self._clock, steps))
            self._open.close()
            self._clock = None

    def _start_trace(self) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        # the profiler's library logs to stderr, also that there is no GPU; above its highest level it is silent
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        # acc_events changes nothing here, where one cycle is traced: without it PyTorch 2.11 warns of later ones
        self._trace = torch.profiler.profile(activities=kinds, acc_events=True)
        self._open.enter_context(self._trace)

    def _write_trace(self) -> None:
        trace, self._trace = self._trace, None
        if trace is None or self._folder is None:
            return
        self._open.close()
        path = self._folder / "trace.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(path))
        except OSError as error:
            warn(f"{path}: not written: {error.strerror}; the run goes on without a trace")
            with suppress(OSError):  # half of a trace cannot be read
                path.unlink(missing_ok=True)

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        measured = self._done - WARM_UP
        if kind is None and measured > 0:
            self._finish_clock(measured)
        self._open.close()
