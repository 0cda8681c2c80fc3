"""The numbers of a run: how they are measured, metrics.jsonl and the loggers, and a progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..config.schema.saving import LogConfig
from ..data import Batch
from ..metric_file import METRICS, AppendedLines, rewind
from ..notebook import NotebookBar, in_notebook
from ..phases import phase
from ..terminal import console, note, warn
from ..tracking import processes
from .loggers import Logger, open_logger


class Meter:
    """Mean loss, throughput, and the share of time spent waiting for data, over the steps since the last `read`.

    The loss stays on the device until `read`, so that no other step waits for it.
    """

    def __init__(self, images_per_step: int) -> None:
        self._images_per_step = images_per_step
        self._reset()

    def _reset(self) -> None:
        self._steps, self._waited, self._start = 0, 0.0, time.perf_counter()
        self._last_step = self._start
        self._loss: Tensor | float = 0.0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches`; the time in which the loop waits for them is measured."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            with phase("data"):
                batch = next(iterator, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor) -> None:
        """Call after each step, with its loss (0-dim)."""
        self._loss = self._loss + loss
        self._steps += 1
        self._last_step = time.perf_counter()

    def skip(self) -> None:
        """Do not count the time since the last step: it was spent on validation."""
        self._start += time.perf_counter() - self._last_step

    def read(self, steps_left: int) -> dict[str, float]:
        """The numbers since the last `read`, and the time that `steps_left` more steps take. Waits for the device."""
        loss = float(self._loss) / max(1, self._steps)  # read first: the time below then includes the device's work
        elapsed = time.perf_counter() - self._start
        numbers = {
            "loss": loss,
            "images_per_s": round(self._steps * self._images_per_step / elapsed, 1),
            "data_wait": round(self._waited / elapsed, 4),
            "time_left_s": round(steps_left * elapsed / max(1, self._steps), 1),
        }
        self._reset()
        return numbers


class MetricLog:
    """Appends one JSON line for each event to `folder/metrics.jsonl`, and passes it to the loggers of `log.to`.

    A file that cannot be written is told once, and the run goes on. On ranks other than 0 (`folder=None`) all methods
    do nothing.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: LogConfig | None = None,
        *,
        resumed_at: int | None = None,
        validated: int | None = None,
    ) -> None:
        """settings: None for metrics.jsonl alone. resumed_at: the step from which a run goes on, and `validated` the
        last one whose validation it does not do again: events after these are removed from metrics.jsonl, and
        TensorBoard no longer shows them."""
        self._lines: AppendedLines | None = None
        self._loggers: list[Logger] = []
        self._followed = folder if settings is not None and settings.trackers else None
        if folder is None:
            return
        if resumed_at is not None:
            rewind(folder / METRICS, resumed_at, warn, validated=validated)
        self._lines = AppendedLines(folder / METRICS, warn)
        if settings is None:
            return
        opened = (open_logger(name, folder, resumed_at) for name in settings.loggers)
        self._loggers += [logger for logger in opened if logger is not None]
        if settings.metrics_port is not None:
            from .metrics_endpoint import MetricsEndpoint

            endpoint = MetricsEndpoint(settings.metrics_port, {"run": folder.name}, warn)
            if endpoint.url is not None:
                note(f"metrics: {endpoint.url}")
            self._loggers.append(endpoint)
        if self._followed is not None:
            processes.follow(folder, settings.trackers, settings.artifacts)

    def log(self, event: str, step: int, **values: Any) -> None:
        """Write one event."""
        if self._lines is None:
            return
        line = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        self._lines.write(json.dumps(line))
        for logger in self._loggers:
            logger.write(event, step, line)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lines is not None:
            self._lines.close()
        for logger in self._loggers:
            logger.close()
        if self._followed is not None:
            processes.leave(self._followed, finished=error is None)


class ProgressLine:
    """A progress bar on a terminal and in a notebook; elsewhere (a log file) a line after an epoch, at most one every
    10 s.

    Prints nothing where `shown` is False, as on ranks other than 0.
    """

    MIN_INTERVAL_S = 10.0

    def __init__(self, total_steps: int, epochs: int, *, shown: bool) -> None:
        self._epochs = epochs
        self._shown = shown
        self._live = shown and console.is_terminal
        self._bar = NotebookBar("pretrain", total_steps) if shown and in_notebook() else None
        self._last_line = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("pretrain", total=total_steps, numbers="")

    def update(self, step: int, numbers: dict[str, float]) -> None:
        """Show the numbers of a logged step (see Meter.read) on the bar."""
        text = f"loss {numbers['loss']:.4f}  {numbers['images_per_s']:,.0f} images/s  "
        text += f"data wait {numbers['data_wait']:.1%}"
        self._progress.update(self._task, completed=step, numbers=text)
        if self._bar is not None:
            self._bar.update(step, f"{text}  {numbers['time_left_s']:.0f} s left")

    def print_validation(self, step: int, numbers: dict[str, float]) -> None:
        self.print(f"step {step}  validation " + "  ".join(f"{name} {value:.4f}" for name, value in numbers.items()))

    def print(self, line: str) -> None:
        """Print one line above the bar."""
        if self._shown:
            note(line)

    def end_epoch(self, epoch: int, numbers: dict[str, float]) -> None:
        """Print the numbers of an epoch where there is no bar; `epoch` counts from 1."""
        due = time.monotonic() - self._last_line >= self.MIN_INTERVAL_S or epoch == self._epochs
        if self._shown and not self._live and self._bar is None and due:
            self._last_line = time.monotonic()
            note(
                f"epoch {epoch}/{self._epochs}  loss {numbers['loss']:.4f}  {numbers['images_per_s']:,.0f} images/s  "
                f"data wait {numbers['data_wait']:.1%}  {numbers['time_left_s']:.0f} s left"
            )

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
