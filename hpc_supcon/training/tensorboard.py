"""TensorBoard events, on a disk that may fail."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

RETRY_S = 60.0
"""Between two attempts to write again after the disk has failed."""


class TensorBoard:
    """Writes numbers as TensorBoard events. A disk that fails is told once; later numbers are tried again."""

    def __init__(self, folder: Path, warn: Callable[[str], None], *, purge_step: int | None = None) -> None:
        """purge_step: TensorBoard no longer shows events of this step and later ones that were written before."""
        self._folder, self._warn, self._purge_step = folder, warn, purge_step
        self._writer: SummaryWriter | None = None
        self._retry_at = 0.0
        self._is_told = False
        self._previous_hook = threading.excepthook
        threading.excepthook = self._hook  # the writer's thread raises its error once more, with a traceback
        self.add({}, 0)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Show the floats in `values` as `event/name`."""
        floats = {f"{event}/{name}": value for name, value in values.items() if isinstance(value, float)}
        self.add({name: value for name, value in floats.items() if name != f"{event}/time"}, step)

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        try:
            if self._writer is None and time.monotonic() >= self._retry_at:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
            if self._writer is not None:
                for name, value in numbers.items():
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._failed(error)
        except ModuleNotFoundError:
            self._retry_at = math.inf
            self._warn(f"{self._folder}: no events, since the package tensorboard is not installed: pip install it")

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._failed(error)
        threading.excepthook = self._previous_hook

    def _failed(self, error: OSError) -> None:
        self._writer, self._retry_at = None, time.monotonic() + RETRY_S
        if not self._is_told:
            self._is_told = True
            self._warn(
                f"{self._folder}: not written: {error.strerror}; the run goes on, and tries again every {RETRY_S:g} s"
            )

    def _hook(self, raised: threading.ExceptHookArgs) -> None:
        is_writer = raised.thread is not None and type(raised.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(raised.exc_value, OSError)):
            self._previous_hook(raised)
