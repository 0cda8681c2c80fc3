"""Saving while training goes on: a thread writes a copy of the state; failed saves are counted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import RunFolderError

NamedTensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file stem and name."""


class Save(Protocol):
    """`checkpoint.save_checkpoint` with its settings bound."""

    def __call__(
        self, step: int, tensors: NamedTensors, state: Mapping[str, Any], *, protect: Collection[int] = ()
    ) -> object: ...


class CheckpointWriter:
    """Saves the checkpoints of one run, one at a time; on one rank only.

    With `asynchronous`, `save` returns as soon as a copy of the state is in host memory (which needs that much more
    memory during a save), and a second save waits for the first. `warn` is called with a message as soon as a save
    fails. `max_failed` failures in a row are tolerated; one more raises RunFolderError in the next `save` or `close`.
    The last save must succeed: `close` raises when it failed.
    """

    def __init__(
        self, save: Save, *, asynchronous: bool = True, max_failed: int = 0, warn: Callable[[str], None] = print
    ) -> None:
        self._save, self._asynchronous, self._max_failed, self._warn = save, asynchronous, max_failed, warn
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[RunFolderError | None] | None = None
        self._failed = 0
        """Failures in a row."""
        self._last_error: RunFolderError | None = None

    def save(
        self, step: int, tensors: NamedTensors, state: Mapping[str, Any], *, protect: Collection[int] = ()
    ) -> None:
        """Save the state of `step`; `tensors` and `state` may change as soon as this returns.

        Raises RunFolderError for this save, or for the one before, in which case this one is not started.
        """
        self._wait()
        if self._asynchronous:
            copies = copy_to_host(tensors), deepcopy(dict(state)), tuple(protect)
            self._pending = self._thread.submit(self._write, step, *copies)
            return
        self._count(self._write(step, tensors, state, tuple(protect)))

    def close(self) -> None:
        """Wait for the pending save. Raises RunFolderError when the last save failed. May be called again."""
        try:
            self._wait()
            if self._last_error is not None:
                error, self._last_error = self._last_error, None
                raise error
        finally:
            self._thread.shutdown()

    def _write(
        self, step: int, tensors: NamedTensors, state: Mapping[str, Any], protect: Collection[int]
    ) -> RunFolderError | None:
        try:
            self._save(step, tensors, state, protect=protect)
        except RunFolderError as error:
            if self._failed < self._max_failed:
                self._warn(f"failed save {self._failed + 1} of {self._max_failed} that are tolerated: {error}")
            return error
        return None

    def _wait(self) -> None:
        """Wait for the pending save, and count its failure. Raises RunFolderError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._count(pending.result())

    def _count(self, error: RunFolderError | None) -> None:
        """Take in the result of a save. Raises RunFolderError when too many failed in a row."""
        self._last_error = error
        self._failed = self._failed + 1 if error else 0
        if error is not None and self._failed > self._max_failed:
            self._last_error = None
            raise error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the pending save. After another error, a failed save is only a warning, so as not to hide it."""
        try:
            self.close()
        except RunFolderError as failed:
            if kind is None:
                raise
            self._warn(str(failed))


def copy_to_host(tensors: NamedTensors) -> dict[str, dict[str, Tensor]]:
    """Row-major copies in host memory, which later training steps do not change.

    From a GPU all copies run at once into pinned memory, and the host waits for the device once.
    """
    copies = {stem: {name: _copy(t) for name, t in named.items()} for stem, named in tensors.items()}
    for device in {t.device for named in tensors.values() for t in named.values() if t.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _copy(t: Tensor) -> Tensor:
    pinned = t.device.type == "cuda"
    copy = torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned)
    return copy.copy_(t.detach(), non_blocking=pinned)
