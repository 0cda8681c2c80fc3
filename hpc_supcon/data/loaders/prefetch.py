"""Batches prepared ahead: by threads, and on their way to the device."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import HpcSupconError, LoaderDied
from .base import Batch

T = TypeVar("T")
Begun = tuple[T, Sequence["Future[Any]"]]
"""What a batch will be, and the work that is left on it."""

DEPTH = 2
"""Batches that are worked on beyond the one in use."""


class Team:
    """A pool of daemon threads: unlike concurrent.futures' they do not keep the process when one of them hangs."""

    def __init__(self, threads: int) -> None:
        self._closed = False
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name="loader", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.put((future, job))
        return future

    def _work(self) -> None:
        while (work := self._jobs.get()) is not None:
            future, job = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as error:  # raised where the batch is waited for
                future.set_exception(error)
            del work, future, job  # or the last batch would live until the next one comes

    def close(self, timeout_s: float) -> None:
        """Drop what has not begun and end the threads; one that hangs is left behind after timeout_s.

        Only the first call does anything.
        """
        if self._closed:
            return
        self._closed = True
        try:
            while (work := self._jobs.get_nowait()) is not None:
                work[0].cancel()
        except Empty:
            pass
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def in_order(begun: Iterator[Begun[T]], *, timeout_s: float, loader: str) -> Iterator[T]:
    """What was begun, in order and finished; DEPTH more are begun before each is waited for.

    Raises LoaderDied when one takes longer than timeout_s, or when the work on it fails; named errors as they are.
    """
    ahead: deque[Begun[T]] = deque()
    for item in begun:
        ahead.append(item)
        if len(ahead) > DEPTH:
            yield _finished(*ahead.popleft(), timeout_s, loader)
    while ahead:
        yield _finished(*ahead.popleft(), timeout_s, loader)


def _finished(result: T, futures: Sequence[Future[Any]], timeout_s: float, loader: str) -> T:
    deadline = time.monotonic() + timeout_s
    for future in futures:
        try:
            future.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeout as error:
            if future.done():  # the work itself raised it
                raise LoaderDied(f"data.loader={loader}: {error!r}") from error
            raise LoaderDied(f"data.loader={loader}: no batch within data.timeout_s={timeout_s:g} s") from error
        except HpcSupconError:
            raise
        except Exception as error:
            raise LoaderDied(f"data.loader={loader}: {type(error).__name__}: {error}") from error
    return result


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; what runs there already is not waited for."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device, non_blocking=True)
    # The caching host allocator keeps pinned memory until the copy out of it is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def to_device(batches: Iterator[Batch], device: torch.device | str) -> Iterator[Batch]:
    """The batches, on `device`.

    On CUDA the next batch is copied from pinned memory on a stream of its own while the caller works on the
    current one. Elsewhere there is nothing to copy, and batches pass through: loaders decode ahead themselves.
    """
    return _overlapped(batches, torch.device(device)) if torch.device(device).type == "cuda" else batches


def _overlapped(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    side = torch.cuda.Stream(device)
    waiting = _copy(next(batches, None), device, side)
    while waiting is not None:
        ready, waiting = waiting, None
        # The order matters: `ready` is waited for before the next copy is queued on the same stream.
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for tensor in (ready.images, ready.labels, ready.index):
            tensor.record_stream(current)  # its memory belongs to the side stream's pool
        waiting = _copy(next(batches, None), device, side)
        yield ready


def _copy(batch: Batch | None, device: torch.device, side: torch.cuda.Stream) -> Batch | None:
    if batch is None:
        return None
    with torch.cuda.stream(side):
        images, labels, index = (sent(tensor, device) for tensor in (batch.images, batch.labels, batch.index))
    return Batch(images, labels, index)
