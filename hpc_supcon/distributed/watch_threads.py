"""The threads of a watch: one looks at this process, one exchanges notes with the other ranks."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from typing import NoReturn

from ..errors import HpcSupconError, RankLost
from . import preemption
from .store import ASKED, LEAVE, LOST, Board, neighbor
from .watch import Phase, Watch

TICK_S = 0.25
NOTES_S = 0.5
"""Between two exchanges of notes; each is two requests to the store, which rank 0 or the launcher serves."""
GRACE_S = 5.0
"""A rank that gives up waits so long for the others' stacks."""
STACKS = "stacks"

ending = threading.Lock()
"""Held while stacks are written, and for ever by whoever ends this process."""


class _Clock:
    """Seconds this process was awake: those in which it was suspended (SIGSTOP, scontrol suspend) do not count."""

    def __init__(self) -> None:
        self._last, self.now = time.monotonic(), 0.0

    def tick(self) -> None:
        now = time.monotonic()
        self.now += min(now - self._last, 2.0)
        self._last = now


class _Idle:
    """How long a number has not changed, by a clock."""

    def __init__(self, clock: _Clock) -> None:
        self._clock, self._value, self._since = clock, "", 0.0

    def of(self, value: object) -> float:
        if str(value) != self._value:
            self._value, self._since = str(value), self._clock.now
        return self._clock.now - self._since


class _Thread(threading.Thread):
    def __init__(self, name: str, watch: Watch) -> None:
        super().__init__(name=name, daemon=True)
        self._watch, self._clock, self._stopped = watch, _Clock(), threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        self.join(GRACE_S)


class Watcher(_Thread):
    """Hears signals at once, and sees a main thread or a messenger that stands still. Waits for no other rank."""

    def __init__(self, watch: Watch, heard: int | None) -> None:
        super().__init__("watch", watch)
        self._heard = heard
        # torchrun; other launchers' processes may end before their ranks do
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def run(self) -> None:
        watch, leaving = self._watch, False
        marks, rounds = _Idle(self._clock), _Idle(self._clock)
        while not self._stopped.is_set():
            self._clock.tick()
            phase, took = watch.phase_now, marks.of(watch.marks)
            if phase.limit_s is not None and took > phase.limit_s:
                give_up(
                    watch, f"rank {watch.rank}: {phase.name}: step {watch.step + 1} took over {phase.limit_s:g} s"
                )
            silent = rounds.of(watch.rounds)
            if watch.board is not None and watch.step_s is not None and silent > watch.step_s:
                give_up(watch, f"rank {watch.rank}: rank 0 or the launcher did not answer for {watch.step_s:g} s")
            if self._launcher not in (None, os.getppid()):
                give_up(watch, f"rank {watch.rank}: torchrun was killed")
            if preemption.requested() is not None and watch.board is None and not leaving:
                leaving = begin_leaving(watch, None)
            self._listen()

    def _listen(self) -> None:
        if self._heard is None:
            self._stopped.wait(TICK_S)
        elif select.select([self._heard], [], [], TICK_S)[0]:
            for number in os.read(self._heard, 1024):
                if number in preemption.SIGNALS:
                    preemption.request(signal.Signals(number).name)


class Messenger(_Thread):
    """Tells the other ranks what this one knows, and does what they ask."""

    def __init__(self, watch: Watch, board: Board) -> None:
        super().__init__("messenger", watch)
        self._board = board
        self._told = self._leaving = False
        # rank 0 looks after all, all look after rank 0
        self._watched = range(1, board.world_size) if board.rank == 0 else range(1)
        self._silent = {rank: _Idle(self._clock) for rank in self._watched}

    def run(self) -> None:
        while not self._stopped.is_set():
            self._clock.tick()
            try:
                self._exchange()
            except RuntimeError as error:
                self._lose(error)
                return
            self._watch.rounds += 1
            self._stopped.wait(NOTES_S)

    def _exchange(self) -> None:
        watch, board = self._watch, self._board
        board.write("alive", str(watch.rounds))
        notes = board.common()
        if LOST in notes:
            give_up(watch, notes[LOST], told=True)
        if LEAVE in notes and board.rank:
            board.write("left", "yes")
            os._exit(preemption.EXIT_CODE)
        if ASKED in notes:
            preemption.request(notes[ASKED])
        elif (reason := preemption.requested()) and not self._told:
            board.post(ASKED, f"{reason} on rank {board.rank}")
            self._told = True
        if preemption.requested() is not None and board.rank == 0 and not self._leaving:
            self._leaving = begin_leaving(watch, board.twin())
        if not watch.others:
            watch.others = board.own("who") or []
        self._look_after_others()

    def _look_after_others(self) -> None:
        limit = self._watch.step_s
        alive = self._board.own("alive", list(self._watched))
        for rank, sign in zip(self._watched, alive or [], strict=bool(alive)):
            if limit is not None and self._silent[rank].of(sign) > limit:
                give_up(self._watch, f"rank {rank} gave no sign of life for {limit:g} s")

    def _lose(self, error: RuntimeError) -> None:
        """The store is gone. At the end of a run that is as it should be: rank 0 may be the first to finish."""
        if not self._stopped.wait(2 * GRACE_S):
            reason = str(error).strip().splitlines()[0]
            give_up(self._watch, f"rank {self._watch.rank}: rank 0 or the launcher was lost ({reason:.160})")


def begin_leaving(watch: Watch, board: Board | None) -> bool:
    """Leave at once, in a thread of its own, if the phase allows it."""
    phase = watch.seize()
    if phase is not None:
        threading.Thread(target=_leave, args=(watch, phase, board), name="leave", daemon=True).start()
    return phase is not None


def _leave(watch: Watch, phase: Phase, board: Board | None) -> NoReturn:
    """Save what the phase holds, tell the others, end this process."""
    code = preemption.EXIT_CODE
    what = "nothing was left to save"
    try:
        if phase.held is not None:
            phase.held()
            what = f"saved at step {watch.step}"
        say(f"left ({preemption.requested()}, {phase.name}): {what}; start again with --resume")
    except HpcSupconError as error:
        code = error.exit_code
        say(f"error: {error}")
    if board is not None:
        with suppress(RuntimeError):
            board.post(LEAVE, "yes")
            _wait_for(board, "left", range(1, board.world_size))
    os._exit(code)


def give_up(watch: Watch, why: str, *, told: bool = False) -> NoReturn:
    """Write this rank's stacks, have all other ranks do so, end this process, and stopped ones on this host.

    told: the others know already.
    """
    with ending:
        path = write_stacks(watch, why)
        if not told:
            say(f"error: {why}; all ranks end; stacks: {path}; start again with --resume")
        for pid in _neighbors(watch, range(len(watch.others))):
            _send(pid, signal.SIGCONT)  # one that was stopped can now write its stacks as well
        silent = list(range(len(watch.others)))
        if watch.board is not None:
            # the store may be gone, or stopped: whoever waits for it is left behind
            talk = threading.Thread(target=_tell, args=(watch.board.twin, why, silent), daemon=True)
            talk.start()
            talk.join(GRACE_S + 1)
        for pid in _neighbors(watch, silent):
            _send(pid, signal.SIGKILL)
        os._exit(RankLost.exit_code)


def _tell(board: Callable[[], Board], why: str, silent: list[int]) -> None:
    """Tell the others, wait for their stacks; `silent` keeps the ranks of whom nothing is heard."""
    try:
        mine = board()
        mine.post(LOST, why)
        mine.write("stacks", "yes")
        _wait_for(mine, "stacks", range(mine.world_size))
        silent[:] = [rank for rank in silent if mine.own("stacks", [rank]) is None]
        if mine.rank == 0:
            time.sleep(TICK_S)  # the store may be here: the others leave first
    except RuntimeError:  # rank 0 has gone, having waited for all, or was lost, which each sees for itself
        silent.clear()


def _neighbors(watch: Watch, ranks: Iterable[int]) -> list[int]:
    """Processes of these ranks that are alive on this host, but this one."""
    found = [neighbor(watch.others[rank]) for rank in ranks if rank != watch.rank]
    return [pid for pid in found if pid is not None]


def _wait_for(board: Board, about: str, ranks: range) -> None:
    """Until these ranks have put up a note, at most GRACE_S."""
    deadline = time.monotonic() + GRACE_S
    while board.own(about, list(ranks)) is None and time.monotonic() < deadline:
        time.sleep(0.05)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def write_stacks(watch: Watch, why: str, error: BaseException | None = None) -> str:
    """Every thread's stack into folder/stacks/rank-R.txt, or to stderr without a folder; returns where."""
    if watch.folder is None or not watch.folder.is_dir():
        faulthandler.dump_traceback(sys.stderr)
        return "stderr"
    path = watch.folder / STACKS / f"rank-{watch.rank}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {why}\n\n")
            if error is not None:
                traceback.print_exception(error, file=file)
                file.write("\n")
            file.flush()
            faulthandler.dump_traceback(file)
    except OSError as refused:
        say(f"stacks not written to {path}: {refused.strerror}")
        faulthandler.dump_traceback(sys.stderr)
        return "stderr"
    return str(path)


def say(line: str) -> None:
    """One line on stderr, from any thread."""
    sys.stderr.write(f"hpc-supcon: {line}\n")
    sys.stderr.flush()
