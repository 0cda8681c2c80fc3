"""The `torch` loader: worker processes decode whole batches ahead into memory shared through torch.

PyTorch's own DataLoader does the same and cannot keep this project's promises: all its workers answer through
one queue, which one that is killed while it holds the lock closes for ever; a death is raised by a signal
handler, wherever the main thread happens to be; and every batch is a new shared-memory file.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import NoReturn

import torch
import torch.multiprocessing as mp
from torch import Tensor

from ...errors import HpcSupconError, LoaderDied
from ..sources.source import Source
from .base import Batch, LoaderOptions, Steps, Task
from .prefetch import to_device
from .reading import Indices, SampleReader

AHEAD = 2
"""Batches in the works per worker: the one it decodes, and the one it goes on with at once."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class TorchLoader:
    """Loader whose `options.workers` processes start with the first batch and live until `close()`."""

    def __init__(self, source: Source, steps: Steps, device: torch.device | str, options: LoaderOptions) -> None:
        self._steps, self._options, self._device = steps, options, device
        self._labels = source.labels
        self._reader = SampleReader(source, steps.seed, options.crop, options.on_corrupt)
        self.steps_per_epoch = len(steps)
        self.replaced = 0
        self._team: _Team | None = None
        self._closed = False

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See Loader.epoch."""
        if self._closed:
            raise RuntimeError("this loader is closed")
        return to_device(self._serve(self._steps.of(epoch, start)), self._device)

    def _serve(self, tasks: list[Task]) -> Iterator[Batch]:
        mine = self._steps.begin()
        if not tasks or self._closed:
            return
        if self._team is None:
            slots = torch.empty(
                AHEAD * self._options.workers, self._steps.largest_batch, *self._reader.shape, dtype=torch.uint8
            )
            self._team = _Team(self._reader, slots, self._options.workers, self._options.timeout_s)
        self._team.forget()
        waiting = deque(tasks)
        for _ in tasks:
            while waiting and self._team.has_room:
                self._team.send(waiting.popleft())
            images, served, replaced = self._team.receive()
            self.replaced += replaced
            yield Batch(images, self._labels[served], served)
            if self._closed or not self._steps.is_current(mine):
                return

    def close(self) -> None:
        """End the worker processes."""
        self._closed = True
        if self._team is not None:
            self._team.close()
            self._team = None


class _Team:
    """Worker processes with a pipe each, given batches in turn; answers come in the order of the batches."""

    def __init__(self, reader: SampleReader, slots: Tensor, workers: int, timeout_s: float) -> None:
        """slots: uint8 [AHEAD * workers, B, ...], where the workers write."""
        self._slots = slots.share_memory_()  # the file has no name: nothing is left of it, however this ends
        self._timeout_s = timeout_s
        self._sent = 0
        self._under_way: deque[tuple[int, int]] = deque()  # (number of the task, its images), oldest first
        # A fork of this process would copy locks that its other threads (OpenMP, CUDA, NCCL) may hold; a spawn
        # would import torch once per worker, which the fork server does once for all.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        self._pipes: list[Connection] = []
        self._workers: list[BaseProcess] = []
        # Runs when this object is dropped, and before multiprocessing waits for its children at exit.
        self.close = util.Finalize(self, _end, (self._workers, self._pipes), exitpriority=10)
        try:
            with _signals_blocked():
                for _ in range(workers):
                    self._start(context, reader)
        except OSError as error:
            self._fail(
                f"worker processes cannot be started ({error}); a script must do its work under "
                "if __name__ == '__main__', for they import it",
                error,
            )

    def _start(self, context: ForkServerContext, reader: SampleReader) -> None:
        ours, theirs = context.Pipe()
        self._pipes.append(ours)
        with theirs:  # closed here, so that a worker's death closes its pipe
            worker = context.Process(target=_work, args=(theirs, reader, self._slots), daemon=True)
            worker.start()
        self._workers.append(worker)

    @property
    def has_room(self) -> bool:
        return len(self._under_way) < len(self._slots)

    def send(self, task: Task) -> None:
        epoch, index = task
        worker, slot = self._sent % len(self._workers), self._sent % len(self._slots)
        try:
            self._pipes[worker].send((slot, epoch, index.numpy()))
        except OSError as error:
            self._give_up(worker, error)
        self._under_way.append((self._sent, len(index)))
        self._sent += 1

    def receive(self) -> tuple[Tensor, Tensor, int]:
        """(images, indices served, number replaced) of the oldest task."""
        number, size = self._under_way.popleft()
        reply = self._reply(number % len(self._workers))
        if isinstance(reply, HpcSupconError):
            raise reply
        served, replaced = reply
        return self._slots[number % len(self._slots), :size].clone(), torch.from_numpy(served), replaced

    def forget(self) -> None:
        """Wait for the tasks of an epoch that nobody wants any more."""
        while self._under_way:
            self._reply(self._under_way.popleft()[0] % len(self._workers))

    def _reply(self, worker: int) -> tuple[Indices, int] | HpcSupconError:
        pipe, sentinel = self._pipes[worker], self._workers[worker].sentinel
        if pipe not in (ready := wait([pipe, sentinel], self._timeout_s)):
            if not ready:
                self._fail(f"no batch within data.timeout_s={self._timeout_s:g} s from worker process {worker}")
            self._give_up(worker, None)
        try:
            return pipe.recv()
        except (EOFError, OSError) as error:
            self._give_up(worker, error)

    def _give_up(self, worker: int, cause: Exception | None) -> NoReturn:
        process = self._workers[worker]
        process.join(self._timeout_s)
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        self._fail(f"worker process {worker} (pid {process.pid}) {how}", cause)

    def _fail(self, reason: str, cause: Exception | None = None) -> NoReturn:
        self.close()
        raise LoaderDied(f"data.loader=torch: {reason}") from cause


def _end(workers: list[BaseProcess], pipes: list[Connection]) -> None:
    """Workers only read, so they are not asked. They would not hear a SIGTERM."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
        worker.close()
    for pipe in pipes:
        pipe.close()


def _work(pipe: Connection, reader: SampleReader, slots: Tensor) -> None:
    """A worker process: until the other end of the pipe is closed, by whatever."""
    for number in _SIGNALS:  # they reach the whole process group; workers end when their run does, not before
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    images = slots.numpy()
    while True:
        try:
            slot, epoch, index = pipe.recv()
        except (EOFError, OSError):
            return
        before = reader.replaced
        try:
            served = reader.fill(images[slot], epoch, index)
        except HpcSupconError as error:
            pipe.send(error)
        else:
            pipe.send((served, reader.replaced - before))


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """New processes inherit the mask, and so survive a signal that comes before they are deaf to it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
