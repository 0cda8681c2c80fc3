"""Saving beside training: a copy of the state is taken, a thread writes it, a failure is counted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import RunFolderError

Tensors = Mapping[str, Mapping[str, Tensor]]


class Save(Protocol):
    """`checkpoint.save_checkpoint` with its settings bound."""

    def __call__(
        self, step: int, tensors: Tensors, state: Mapping[str, Any], *, protect: Collection[int] = ()
    ) -> object: ...


class CheckpointWriter:
    """Saves one run's checkpoints, one at a time; on one rank only.

    With `asynchronous`, `save` returns as soon as a copy of the state lies in host memory (so that much more
    of it is needed while a save is under way), and a second save waits for the first. A failed save is told
    as soon as it fails and is outlived `max_failed` times in a row; one more raises RunFolderError at the next
    `save`, `poll` or `close`. The last save of all must succeed: `close` raises when it did not.
    """

    def __init__(
        self, save: Save, *, asynchronous: bool = True, max_failed: int = 0, tell: Callable[[str], None] = print
    ) -> None:
        self._save, self._asynchronous, self._max_failed, self._tell = save, asynchronous, max_failed, tell
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[RunFolderError | None] | None = None
        self._failed = 0
        self._last: RunFolderError | None = None

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any], *, protect: Collection[int] = ()) -> None:
        """Save the state of `step`; `tensors` and `state` may change as soon as this returns.

        Raises RunFolderError, of this save or of the one before (then this one is not begun).
        """
        self._settle()
        if self._asynchronous:
            copies = snapshot(tensors), deepcopy(dict(state)), tuple(protect)
            self._under_way = self._thread.submit(self._write, step, *copies)
            return
        self._count(self._write(step, tensors, state, tuple(protect)))

    def poll(self) -> None:
        """Raise what the save under way came to, if it has come to an end. Never waits."""
        if self._under_way is not None and self._under_way.done():
            self._settle()

    def close(self) -> None:
        """Wait for the save under way. Raises RunFolderError when the last save failed. Idempotent."""
        try:
            self._settle()
            if self._last is not None:
                error, self._last = self._last, None
                raise error
        finally:
            self._thread.shutdown()

    def _write(
        self, step: int, tensors: Tensors, state: Mapping[str, Any], protect: Collection[int]
    ) -> RunFolderError | None:
        try:
            self._save(step, tensors, state, protect=protect)
        except RunFolderError as error:
            if self._failed < self._max_failed:
                self._tell(f"failed save {self._failed + 1} of {self._max_failed} that are outlived: {error}")
            return error
        return None

    def _settle(self) -> None:
        pending, self._under_way = self._under_way, None
        if pending is not None:
            self._count(pending.result())

    def _count(self, error: RunFolderError | None) -> None:
        self._last = error
        self._failed = self._failed + 1 if error else 0
        if error is not None and self._failed > self._max_failed:
            self._last = None
            raise error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait in every case; on the way out of an error, a failed save is told and does not hide it."""
        try:
            self.close()
        except RunFolderError as failed:
            if kind is None:
                raise
            self._tell(str(failed))


def snapshot(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Row-major copies in host memory that later training steps do not touch.

    From a GPU all copies run at once into pinned memory, and the device is waited for once.
    """
    copies = {stem: {name: _copy(t) for name, t in named.items()} for stem, named in tensors.items()}
    for device in {t.device for named in tensors.values() for t in named.values() if t.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _copy(t: Tensor) -> Tensor:
    pinned = t.device.type == "cuda"
    copy = torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned)
    return copy.copy_(t.detach(), non_blocking=pinned)
