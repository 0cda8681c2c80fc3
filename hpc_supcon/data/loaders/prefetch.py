"""Batches prepared ahead: by threads, and on their way to the device."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import nullcontext
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from ...errors import HpcSupconError, LoaderDied
from ..views.pixels import copy_async
from .base import Batch, BatchRequest, EpochSteps

DEPTH = 2
"""Batches that are prepared beyond the one in use."""


class DaemonThreadPool:
    """A pool of daemon threads: unlike concurrent.futures', a thread that hangs does not keep the process alive.

    On a CUDA device, each thread has a stream of its own: on the default one, a job would wait for the training step
    that is queued there. A job must itself wait for its stream before it returns.
    """

    def __init__(self, threads: int, device: torch.device | None = None) -> None:
        self._closed, self._device = False, device
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name="loader", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.put((future, job))
        return future

    def _work(self) -> None:
        on_cuda = self._device is not None and self._device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(self._device)) if on_cuda else nullcontext():
            self._do_jobs()

    def _do_jobs(self) -> None:
        while (work := self._jobs.get()) is not None:
            future, job = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as error:  # raised by future.result()
                future.set_exception(error)
            del work, future, job  # or the last batch would stay in memory until the next one comes

    def close(self, timeout_s: float) -> None:
        """Cancel the jobs that are queued and end the threads; one that hangs is abandoned after timeout_s.

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


PendingBatch = tuple[Callable[[], Batch], Sequence["Future[Any]"]]
"""What returns the batch, once all of these jobs are done."""
StartBatch = Callable[[DaemonThreadPool, int, Tensor], PendingBatch]
"""(pool, epoch, index int64 [B]): submits the jobs of one batch."""


class ThreadedEpochs:
    """Batches prepared by threads, DEPTH ahead and in order; one epoch at a time, with threads of its own."""

    def __init__(
        self,
        loader: str,
        steps: EpochSteps,
        start: StartBatch,
        *,
        threads: int,
        timeout_s: float,
        join_s: float,
        device: torch.device | None = None,
    ) -> None:
        """loader: its name, for messages. timeout_s: longest wait for one batch; join_s: for the end of a thread.
        device: where the jobs compute; None: on the CPU."""
        self._device = device
        self._loader, self._steps, self._start, self._threads = loader, steps, start, threads
        self._timeout_s, self._join_s = timeout_s, join_s
        self._pool: DaemonThreadPool | None = None
        self._closed = False

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """See Loader.epoch. Raises LoaderDied also when a job raises what is not a named error."""
        if self._closed:
            raise RuntimeError("this loader is closed")
        return self._batches(self._steps.requests(epoch, start))

    def _batches(self, requests: list[BatchRequest]) -> Iterator[Batch]:
        self._end_threads()
        if self._closed:
            return
        number, pool = self._steps.start_epoch(), DaemonThreadPool(self._threads, self._device)
        self._pool = pool
        try:
            for batch in self._in_order(self._start(pool, *request) for request in requests):
                yield batch
                if self._closed or not self._steps.is_current(number):
                    return
        except LoaderDied:
            pool.close(0)  # a thread that hangs was given timeout_s already
            raise
        finally:
            pool.close(self._join_s)

    def _in_order(self, pending: Iterator[PendingBatch]) -> Iterator[Batch]:
        """DEPTH more are started before each is waited for."""
        ahead: deque[PendingBatch] = deque()
        for item in pending:
            ahead.append(item)
            if len(ahead) > DEPTH:
                yield self._finished(*ahead.popleft())
        while ahead:
            yield self._finished(*ahead.popleft())

    def _finished(self, batch: Callable[[], Batch], jobs: Sequence[Future[Any]]) -> Batch:
        deadline = time.monotonic() + self._timeout_s
        for job in jobs:
            try:
                job.result(max(0.0, deadline - time.monotonic()))
            except FutureTimeout as error:
                if job.done():  # the job itself raised it
                    raise LoaderDied(f"data.loader={self._loader}: {error!r}") from error
                raise LoaderDied(
                    f"data.loader={self._loader}: no batch within data.timeout_s={self._timeout_s:g} s"
                ) from error
            except HpcSupconError:
                raise
            except Exception as error:
                raise LoaderDied(f"data.loader={self._loader}: {type(error).__name__}: {error}") from error
        return batch()

    def close(self) -> None:
        """End the threads of an epoch in progress."""
        self._closed = True
        self._end_threads()

    def _end_threads(self) -> None:
        if self._pool is not None:
            self._pool.close(self._join_s)
            self._pool = None


def to_device(batches: Iterator[Batch], device: torch.device | str) -> Iterator[Batch]:
    """The batches, on `device`.

    On CUDA the next batch is copied from pinned memory on a stream of its own while the caller works on the
    current one. Elsewhere there is nothing to copy, and batches pass through: loaders decode ahead themselves.
    """
    return _overlapped(batches, torch.device(device)) if torch.device(device).type == "cuda" else batches


def _overlapped(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    side = torch.cuda.Stream(device)
    copied = _copy(next(batches, None), device, side)
    while copied is not None:
        ready, copied = copied, None
        # The order matters: `ready` is waited for before the next copy is queued on the same stream.
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for tensor in (ready.images, ready.labels, ready.index):
            tensor.record_stream(current)  # its memory belongs to the side stream's pool
        copied = _copy(next(batches, None), device, side)
        yield ready


def _copy(batch: Batch | None, device: torch.device, side: torch.cuda.Stream) -> Batch | None:
    if batch is None:
        return None
    with torch.cuda.stream(side):
        images, labels, index = (copy_async(tensor, device) for tensor in (batch.images, batch.labels, batch.index))
    return Batch(images, labels, index)
