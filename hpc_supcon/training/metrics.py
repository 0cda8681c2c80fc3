"""What a run says: metrics.jsonl (always), TensorBoard events, and a progress line on the terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

console = Console(stderr=True, highlight=False)


class MetricLog:
    """Appends one JSON line per event to `folder/metrics.jsonl`, and numbers to TensorBoard.

    On ranks other than 0 (`folder=None`) every call does nothing.
    """

    def __init__(self, folder: Path | None, *, tensorboard: bool = True) -> None:
        self._file = None if folder is None else (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._writer = SummaryWriter(str(folder / "tensorboard")) if folder is not None and tensorboard else None

    def log(self, event: str, step: int, **values: Any) -> None:
        """One event. Floats in `values` also go to TensorBoard as `event/name`."""
        if self._file is None:
            return
        line = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{event}/{name}", value, step)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


class ProgressLine:
    """A live bar on a terminal; elsewhere (a log file) a plain line after an epoch, at most every 10 s.

    Silent on other ranks.
    """

    QUIET_S = 10.0

    def __init__(self, total_steps: int, epochs: int, *, shown: bool) -> None:
        self._epochs = epochs
        self._shown = shown
        self._live = shown and console.is_terminal
        self._spoke = time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("pretrain", total=total_steps, numbers="")

    def update(self, step: int, numbers: dict[str, float]) -> None:
        text = f"loss {numbers['loss']:.4f}  {numbers['images_per_s']:,.0f} images/s  "
        text += f"data wait {numbers['data_wait']:.1%}"
        self._progress.update(self._task, completed=step, numbers=text)

    def validated(self, step: int, numbers: dict[str, float]) -> None:
        self.say(f"step {step}  validation " + "  ".join(f"{name} {value:.4f}" for name, value in numbers.items()))

    def say(self, line: str) -> None:
        if self._shown:
            console.print(line, soft_wrap=True)

    def epoch_done(self, epoch: int, numbers: dict[str, float]) -> None:
        due = time.monotonic() - self._spoke >= self.QUIET_S or epoch == self._epochs
        if self._shown and not self._live and due:
            self._spoke = time.monotonic()
            console.print(
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
