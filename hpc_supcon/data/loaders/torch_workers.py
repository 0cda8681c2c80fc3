"""The `torch` loader: worker processes decode whole batches ahead into memory shared through torch.

PyTorch's own DataLoader does the same and cannot give this project's guarantees: all its workers send results
through one queue, which a worker that is killed while it holds the lock blocks for good; a death is raised by a
signal handler, wherever the main thread happens to be; and every batch is a new shared-memory file.
"""

from __future__ import annotations

import pickle
import signal
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import NoReturn

import torch
import torch.multiprocessing as mp
from torch import Tensor

from ...errors import DataError, HpcSupconError, LoaderDied, first_line
from ..philox import IntArray
from ..sources.source import Source
from .base import Batch, BatchRequest, EpochSteps, LoaderOptions, count_replaced, served
from .prefetch import to_device
from .sample_reader import SampleReader

PREFETCH_FACTOR = 2
"""Batches requested from each worker at once: the one it decodes, and the one it continues with."""
SHM = "/dev/shm"  # noqa: S108 (named in messages only)
MORE_SHM = f"give {SHM} more space (docker: --shm-size), or lower data.workers or data.batch_size"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class TorchLoader:
    """Loader whose `options.workers` processes start with the first batch and live until `close()`."""

    def __init__(self, source: Source, steps: EpochSteps, device: torch.device | str, options: LoaderOptions) -> None:
        self._steps, self._options, self._device = steps, options, device
        self._labels = source.labels
        self._reader = SampleReader(source, steps.seed, options.crop, options.on_corrupt)
        self.steps_per_epoch = len(steps)
        self.replaced = 0
        self._pool: _WorkerPool | None = None
        self._closed = False

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See Loader.epoch."""
        if self._closed:
            raise RuntimeError("this loader is closed")
        return to_device(self._batches(self._steps.requests(epoch, start)), self._device)

    def _batches(self, requests: list[BatchRequest]) -> Iterator[Batch]:
        number = self._steps.start_epoch()
        if not requests or self._closed:
            return
        if self._pool is None:
            workers, largest = self._options.workers, self._steps.largest_batch
            slots = torch.empty(PREFETCH_FACTOR * workers, largest, *self._reader.shape, dtype=self._reader.dtype)
            pinned = torch.device(self._device).type == "cuda"
            self._pool = _WorkerPool(self._reader, slots, workers, self._options.timeout_s, pinned=pinned)
        self._pool.drain()
        queued = deque(requests)
        for _ in requests:
            while queued and self._pool.has_room:
                self._pool.submit(queued.popleft())
            images, index, loaded = self._pool.receive()
            self.replaced += count_replaced(index, loaded)
            yield served(images, self._labels, loaded)
            if self._closed or not self._steps.is_current(number):
                return

    def close(self) -> None:
        """End the worker processes."""
        self._closed = True
        if self._pool is not None:
            self._pool.close()
            self._pool = None


class _WorkerPool:
    """Worker processes with a pipe each, which take batches in turn; results come in the order of the batches."""

    def __init__(
        self, reader: SampleReader, slots: Tensor, workers: int, timeout_s: float, *, pinned: bool = False
    ) -> None:
        """slots: levels [PREFETCH_FACTOR * workers, B, ...], where the workers write. pinned: batches are copied into
        pinned memory, from which they are sent to the device without another copy."""
        self._pinned = pinned
        self._slots = _shared(slots)
        self._timeout_s = timeout_s
        self._submitted = 0
        self._pending: deque[tuple[int, Tensor]] = deque()  # (number of the request, its images), oldest first
        # A fork of this process would copy locks that its other threads (OpenMP, CUDA, NCCL) may hold; spawn
        # would import torch once per worker, which the fork server does once for all.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        self._pipes: list[Connection] = []
        self._workers: list[BaseProcess] = []
        # Runs when this object is deleted, and before multiprocessing joins its children at exit.
        self.close = util.Finalize(self, _end, (self._workers, self._pipes), exitpriority=10)
        try:
            with _signals_blocked():
                for _ in range(workers):
                    self._start(context, _Sent(reader))
        except HpcSupconError:
            self.close()
            raise
        except OSError as error:
            self._fail(f"worker processes cannot be started ({error}){_advice(error)}", error)

    def _start(self, context: ForkServerContext, reader: _Sent) -> None:
        ours, theirs = context.Pipe()
        self._pipes.append(ours)
        with theirs:  # closed here, so that a worker's death closes its pipe
            worker = context.Process(target=_work, args=(theirs, reader, self._slots), daemon=True)
            worker.start()
        self._workers.append(worker)

    @property
    def has_room(self) -> bool:
        return len(self._pending) < len(self._slots)

    def submit(self, request: BatchRequest) -> None:
        epoch, index = request
        worker, slot = self._submitted % len(self._workers), self._submitted % len(self._slots)
        try:
            self._pipes[worker].send((slot, epoch, index.numpy()))
        except OSError as error:
            self._report_death(worker, error)
        self._pending.append((self._submitted, index))
        self._submitted += 1

    def receive(self) -> tuple[Tensor, Tensor, Tensor]:
        """(images, the indices asked for, those loaded) of the oldest request."""
        number, index = self._pending.popleft()
        reply = self._reply(number % len(self._workers))
        if isinstance(reply, HpcSupconError):
            raise reply
        images = self._slots[number % len(self._slots), : len(index)]
        return images.pin_memory() if self._pinned else images.clone(), index, torch.from_numpy(reply)

    def drain(self) -> None:
        """Wait for the pending requests of an earlier epoch, and drop their results."""
        while self._pending:
            self._reply(self._pending.popleft()[0] % len(self._workers))

    def _reply(self, worker: int) -> IntArray | HpcSupconError:
        pipe, sentinel = self._pipes[worker], self._workers[worker].sentinel
        if pipe not in (ready := wait([pipe, sentinel], self._timeout_s)):
            if not ready:
                self._fail(f"no batch within data.timeout_s={self._timeout_s:g} s from worker process {worker}")
            self._report_death(worker, None)
        try:
            return pipe.recv()
        except (EOFError, OSError) as error:
            self._report_death(worker, error)

    def _report_death(self, worker: int, cause: Exception | None) -> NoReturn:
        process = self._workers[worker]
        process.join(self._timeout_s)
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        if code == -signal.SIGBUS:
            how += f": {SHM} is full, or an image file was cut short while it was read; {MORE_SHM}"
        self._fail(f"worker process {worker} (pid {process.pid}) {how}", cause)

    def _fail(self, reason: str, cause: Exception | None = None) -> NoReturn:
        self.close()
        raise LoaderDied(f"data.loader=torch: {reason}") from cause


def _shared(slots: Tensor) -> Tensor:
    """`slots` in shared memory. Its file has no name, so nothing is left behind however this ends."""
    try:
        return slots.share_memory_()
    except RuntimeError as error:  # torch has no other type for what the kernel refuses
        reason = str(error).rpartition(">: ")[2].splitlines()[0]
        raise LoaderDied(
            f"data.loader=torch: {slots.nbytes:,} bytes of shared memory for its batches: {reason}; {MORE_SHM}"
        ) from error


def _advice(error: OSError) -> str:
    if isinstance(error, ConnectionError):
        return "; a script must do its work under if __name__ == '__main__', because they import it"
    if "AF_UNIX" in str(error):
        return f": TMPDIR={tempfile.gettempdir()} is too long for the name of a socket; set a shorter one"
    return ""


def _end(workers: list[BaseProcess], pipes: list[Connection]) -> None:
    """SIGKILL: workers ignore SIGTERM, and have nothing to finish, because they only read."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
        worker.close()
    for pipe in pipes:
        pipe.close()


class _Sent:
    """A reader on its way to a worker process; what cannot be sent or received becomes DataError.

    Everything that this package reads can be sent. A dataset of a user may keep an open file or a lambda, or be of a
    class that a new process cannot import, because it was defined in a notebook.
    """

    def __init__(self, reader: SampleReader) -> None:
        self.reader = reader

    def __reduce__(self) -> tuple[object, ...]:
        try:
            return _received, (bytes(ForkingPickler.dumps(self.reader)),)
        except Exception as error:
            raise _not_sent(error) from error


def _received(pickled: bytes) -> SampleReader | DataError:
    try:
        return pickle.loads(pickled)  # noqa: S301 (from the process that started this one)
    except Exception as error:
        return _not_sent(error)


def _not_sent(error: Exception) -> DataError:
    return DataError(
        f"data.loader=torch: the dataset cannot be sent to worker processes ({type(error).__name__}: "
        f"{first_line(error)}): use data.loader=resident, or give it a class of a module that can be imported, which "
        "opens files and the like when an item is asked for, and has no lambdas"
    )


def _work(pipe: Connection, reader: SampleReader | DataError, slots: Tensor) -> None:
    """A worker process: runs until the other end of the pipe is closed, also by the death of its parent.

    reader: as _Sent arrives.
    """
    for number in _SIGNALS:  # they reach the whole process group; workers end when their run does, not before
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    images = slots.numpy()
    while True:
        try:
            slot, epoch, index = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if isinstance(reader, DataError):
                raise reader
            reply: IntArray | HpcSupconError = reader.fill(images[slot], epoch, index)
        except HpcSupconError as error:
            reply = error
        pipe.send(reply)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """New processes inherit the mask, and so survive a signal that comes before they ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
