"""The watchdog of a process: how its ranks save and exit together when preempted, and end together when one hangs.

Two threads run beside the main thread (monitors.py). One watches this process for signals and for progress of the
main thread, the other exchanges messages with the other ranks through the store. The main thread sends nothing for
this: a step costs it one lock and the reading of a flag.

When a run is preempted in training, its ranks exit after a common step. Each rank publishes the number of the first
step after which it knows of the preemption. With M the largest of these numbers, all exit after step M + 1. No rank
can complete step M + 1 before every rank has begun it, and so has published its number: after step M + 1 all ranks
read the same numbers. In other phases (set-up, the first step, validation, probes) rank 0 decides alone. All ranks
took a snapshot of what is worth saving when the phase began, so all of them can exit wherever they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import errors
from ..errors import HpcSupconError, RankLost
from . import preemption
from .launch import set_collective_timeout
from .store import RankStore

MARGIN_S = 10.0
"""Collectives time out this much later than training steps, since the watchdog's message says more."""
FREEZE_TIMEOUT_S = 1.0
"""How long `freeze` waits for the main thread to release the lock, which it only holds for microseconds."""


@dataclass(frozen=True)
class Phase:
    """What the main thread is doing."""

    name: str
    timeout_s: float | None = None
    """Longest time without progress; None: unlimited."""
    may_exit: bool = False
    """Whether rank 0 may end all ranks in the middle of this phase."""
    snapshot: Callable[[], None] | None = None
    """Saves the state as it was when the phase began; called once, from another thread."""


FIRST_STEP, TRAINING = "first step", "training"


@dataclass(frozen=True)
class Failure:
    """The error with which one rank ends, for the other ranks."""

    rank: int
    kind: str
    """Name of its class."""
    message: str

    @property
    def same_for_all(self) -> str:
        """Equal for ranks that have the same error."""
        return f"{self.kind}: {self.message}"

    def to_error(self) -> HpcSupconError:
        """The same error for another rank; RankLost where it is none of the named ones."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, HpcSupconError):
            return kind(f"rank {self.rank}: {self.message}")
        return RankLost(f"rank {self.rank}: {self.same_for_all}")


class Watchdog:
    """One process's part of a run's watchdog. `Watchdog()` alone, without the threads, watches nothing."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        step_timeout_s: float | None = None,
        first_step_timeout_s: float | None = None,
    ) -> None:
        """folder: the run folder; for the timeouts see monitors.start_watchdog."""
        self.folder, self.step_timeout_s, self._first_step_timeout_s = folder, step_timeout_s, first_step_timeout_s
        self.rank, self.step = 0, 0
        self.progress = 0
        """Incremented by the main thread after every step and at every change of phase."""
        self.exchanges = 0
        """Number of exchanges of messages with the other ranks."""
        self.current_phase = Phase("outside training", may_exit=True)
        self.exiting = False
        """The main thread has saved after a preemption and is about to exit."""
        self.store: RankStore | None = None
        """None for a single rank."""
        self.processes: list[str] = []
        """store.process_id of every rank, once all ranks have published theirs."""
        self.device = torch.device("cpu")
        self.failure: Failure | None = None
        """Of the first rank that ended with an error of its own."""
        self._published = False
        self._phase_lock = threading.Lock()

    @contextmanager
    def phase(
        self, name: str, *, may_exit: bool = False, snapshot: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """A phase of the main thread without a timeout; see Phase."""
        with self._inside(Phase(name, None, may_exit, snapshot)):
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, `completed` is called after every step. The first step has a longer timeout and nothing to save."""
        with self._inside(Phase(FIRST_STEP, self._first_step_timeout_s, may_exit=True)):
            yield

    def completed(self, step: int) -> bool:
        """Call after each training step. True on every rank when all ranks must save and exit after this step."""
        with self._phase_lock:  # never returns once this process is about to end
            self.progress += 1
            self.step = step
            if self.current_phase.name == FIRST_STEP:
                self._set_phase(Phase(TRAINING, self.step_timeout_s))
        return preemption.requested() is not None and self._is_exit_step(step)

    def _is_exit_step(self, step: int) -> bool:
        if self.store is None:
            return True
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # otherwise the host could be steps ahead of the collectives
        if not self._published:
            self._published = True
            self.store.set("preempted_at", str(step))
        steps = self.store.rank_values("preempted_at")
        return steps is not None and step > max(map(int, steps))

    @contextmanager
    def _inside(self, phase: Phase) -> Iterator[None]:
        outer = self.current_phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, phase: Phase) -> None:
        with self._phase_lock:  # never returns once this process is about to end
            self._set_phase(phase)

    def _set_phase(self, phase: Phase) -> None:
        if self.store is not None and self.step_timeout_s is not None and self._first_step_timeout_s is not None:
            is_step = phase.name == TRAINING
            set_collective_timeout(self.step_timeout_s + MARGIN_S if is_step else self._first_step_timeout_s)
        self.current_phase = phase
        self.progress += 1

    def lock_phase(self) -> Phase | None:
        """Keep the main thread in its phase for good and return the phase; None if it does not allow to exit."""
        self._phase_lock.acquire()
        if self.current_phase.may_exit and not self.exiting:
            return self.current_phase
        self._phase_lock.release()
        return None

    def freeze(self) -> None:
        """Keep the main thread from completing another step or changing its phase, for good.

        A process that is about to end must not go on training meanwhile: the other ranks could then finish the run
        before they receive the message that ends them too.
        """
        self._phase_lock.acquire(timeout=FREEZE_TIMEOUT_S)  # after `lock_phase` it is taken already


_current = Watchdog()


def current_watchdog() -> Watchdog:
    """The watchdog of this process."""
    return _current


def set_current_watchdog(watchdog: Watchdog) -> Watchdog:
    """Returns the previous one."""
    global _current
    previous, _current = _current, watchdog
    return previous
