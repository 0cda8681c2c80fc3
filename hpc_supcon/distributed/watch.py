"""A run's watch: leaving together when asked to, ending together when a rank hangs or is lost.

Two threads stand beside the main one (watch_threads.py): one looks at this process (has a signal come, does the
main thread make progress), one exchanges notes with the other ranks (board.py). Training itself sends nothing for
all this: a step costs one look at a flag.

Asked to leave while training, the ranks meet at a step. Each puts up the first step edge at which it knows; they
leave at edge M + 1, M being the latest of those. No rank can finish step M + 1 before every rank has begun it, and so
has put up its note: at edge M + 1 all notes are up, and all ranks read the same. In other phases (setting up, the
first step, evaluation) rank 0 decides alone: what is worth saving was put aside by all ranks as the phase began
(`held`), so that all can be ended wherever they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from . import preemption
from .launch import set_collective_timeout
from .store import Board

MARGIN_S = 10.0
"""Collectives wait this much longer than a step may take: who sees a hanging step says more about it."""


@dataclass(frozen=True)
class Phase:
    """What the main thread is doing."""

    name: str
    limit_s: float | None = None
    """Longest time without progress; None: any."""
    may_leave: bool = False
    """Rank 0 may end all ranks in this phase."""
    held: Callable[[], None] | None = None
    """Saves what was worth saving when the phase began; called once, from another thread."""


FIRST_STEP, TRAINING = "first step", "training"


class Watch:
    """One process's part. With a `board` it has other ranks beside it. `Watch()` alone watches nothing."""

    def __init__(
        self, folder: Path | None = None, *, step_s: float | None = None, first_step_s: float | None = None
    ) -> None:
        """folder: the run's; limits in seconds, see `watching`."""
        self.folder, self.step_s, self._first_step_s = folder, step_s, first_step_s
        self.rank, self.step = 0, 0
        self.marks = 0
        """Grows with the main thread's progress."""
        self.rounds = 0
        """Grows with every exchange of notes."""
        self.phase_now = Phase("outside training", may_leave=True)
        self.left = False
        """The main thread is on its way out, having saved."""
        self.board: Board | None = None
        self.others: list[str] = []
        """Processes of all ranks, as board.who describes them."""
        self.device = torch.device("cpu")
        self._noted = False
        self._turn = threading.Lock()

    @contextmanager
    def phase(self, name: str, *, may_leave: bool = False, held: Callable[[], None] | None = None) -> Iterator[None]:
        """What the main thread does inside, however long it takes; see Phase."""
        with self._inside(Phase(name, None, may_leave, held)):
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, `edge` is called after every step. The first may take longer, and has nothing to lose."""
        with self._inside(Phase(FIRST_STEP, self._first_step_s, may_leave=True)):
            yield

    def edge(self, step: int) -> bool:
        """After step `step`: is it the one at which all ranks leave? Every rank gets the same answer."""
        self.marks += 1
        self.step = step
        if self.phase_now.name == FIRST_STEP:
            self._enter(Phase(TRAINING, self.step_s))
        return preemption.requested() is not None and self._agreed(step)

    def _agreed(self, step: int) -> bool:
        if self.board is None:
            return True
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the host runs ahead of what has been done together
        if not self._noted:
            self._noted = True
            self.board.write("edge", str(step))
        edges = self.board.own("edge")
        return edges is not None and step > max(map(int, edges))

    @contextmanager
    def _inside(self, phase: Phase) -> Iterator[None]:
        before = self.phase_now
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, phase: Phase) -> None:
        with self._turn:  # waits for ever when this phase was seized
            if self.board is not None and self.step_s is not None and self._first_step_s is not None:
                short = phase.name == TRAINING
                set_collective_timeout(self.step_s + MARGIN_S if short else self._first_step_s)
            self.phase_now = phase
            self.marks += 1

    def seize(self) -> Phase | None:
        """The phase, from which the main thread will not get out any more; None where it may not be ended."""
        self._turn.acquire()
        if self.phase_now.may_leave and not self.left:
            return self.phase_now
        self._turn.release()
        return None


_current = Watch()


def current() -> Watch:
    """The watch of this process."""
    return _current


def make_current(watch: Watch) -> Watch:
    """Returns the one before."""
    global _current
    before, _current = _current, watch
    return before
