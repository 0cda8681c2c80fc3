"""Ending a process outside its main thread: after a preemption, or because a rank hangs or is lost."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import NoReturn

from ..errors import HpcSupconError, Preempted, RankLost
from ..run_lock import release_all
from . import preemption
from .store import ABORT, EXIT, FAILED, RankStore, is_stopped, local_pid
from .watchdog import Failure, Phase, Watchdog

RANKS_TIMEOUT_S = 10.0
"""How long a rank that ends the run waits for the others to write their stacks, or to exit."""
STORE_TIMEOUT_S = 1.0
"""How long it waits for the store. If that does not answer, its process may be stopped, and is woken up."""
COMMON_ERROR_S = 1.0
"""How long a rank that has an error waits for the others to have the same one."""
POLL_INTERVAL_S = 0.05
STACKS = "stacks"

exit_lock = threading.Lock()
"""Taken while stacks are written, and for good by the thread that ends this process."""


def save_and_exit(watchdog: Watchdog, store: RankStore | None) -> bool:
    """If the current phase allows it: save its snapshot in a new thread, end all ranks, and return True.

    Called on rank 0 only. store: None for a single rank.
    """
    phase = watchdog.lock_phase()
    if phase is None:
        return False
    own_store = None if store is None else store.clone()
    threading.Thread(target=_save_and_exit, args=(watchdog, phase, own_store), name="exit", daemon=True).start()
    return True


def _save_and_exit(watchdog: Watchdog, phase: Phase, store: RankStore | None) -> NoReturn:
    code = Preempted.exit_code
    saved = "nothing to save"
    try:
        if phase.snapshot is not None:
            phase.snapshot()
            saved = f"saved at step {watchdog.step}"
        print_line(f"preempted ({preemption.requested()}, {phase.name}): {saved}; start again with --resume")
    except HpcSupconError as error:
        code = error.exit_code
        print_line(f"error: {error}")
    if store is not None:
        with suppress(RuntimeError):
            store.broadcast(EXIT, "yes")
            _wait_for_ranks(store, "exiting", list(range(1, store.world_size)))
    release_all()
    os._exit(code)


def abort_all_ranks(watchdog: Watchdog, reason: str, *, received: bool = False) -> NoReturn:
    """Write this rank's stacks, have all other ranks do the same, and end this process.

    Ranks on this host that are stopped are woken up to write theirs, and killed if they do not. received: the reason
    comes from another rank, so that the others have it too.
    """
    with exit_lock:
        try:
            watchdog.freeze()
            path = write_stacks(watchdog, reason)
            if not received:
                print_line(f"error: {reason}; all ranks end; stacks: {path}; start again with --resume")
            if watchdog.store is not None:
                _end_others(watchdog, watchdog.store, reason)
        finally:
            os._exit(RankLost.exit_code)


def _end_others(watchdog: Watchdog, store: RankStore, reason: str) -> None:
    silent = set(range(store.world_size)) - {store.rank}
    answered = threading.Event()
    # in a thread: every call waits while the process that hosts the store is stopped
    arguments = (watchdog, store, reason, silent, answered)
    exchange = threading.Thread(target=_exchange, args=arguments, name="exchange", daemon=True)
    exchange.start()
    if not answered.wait(STORE_TIMEOUT_S):
        _signal_local(watchdog, silent, signal.SIGCONT)
    exchange.join(STORE_TIMEOUT_S + 2 * RANKS_TIMEOUT_S)
    _signal_local(watchdog, silent, signal.SIGKILL)


def _exchange(watchdog: Watchdog, store: RankStore, reason: str, silent: set[int], answered: threading.Event) -> None:
    """Send the reason to all ranks and wait for their stacks. Removes the ranks that wrote them from `silent`."""
    try:
        store.set("stacks", "written")
        store.broadcast(ABORT, reason)
        answered.set()
        stopped = {rank for rank in silent if watchdog.processes and is_stopped(watchdog.processes[rank])}
        # the others first: once a stopped rank goes on, they leave the call in which they wait for it
        _wait_for_ranks(store, "stacks", sorted(silent - stopped))
        if stopped:
            _signal_local(watchdog, stopped, signal.SIGCONT)
            _wait_for_ranks(store, "stacks", sorted(stopped))
        silent.difference_update([rank for rank in silent if store.rank_values("stacks", [rank]) is not None])
        if store.rank == 0:
            time.sleep(0.25)  # rank 0 may host the store, from which the others read that they can end
    except RuntimeError:  # the store is gone: rank 0 has ended, or was lost, which every rank finds out by itself
        silent.clear()
        answered.set()


def _signal_local(watchdog: Watchdog, ranks: set[int], number: signal.Signals) -> None:
    """Send a signal to the processes of these ranks that are alive on this host."""
    for rank, process in enumerate(watchdog.processes):
        pid = local_pid(process) if rank in ranks else None
        if pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def report_failure(watchdog: Watchdog, error: Exception) -> None:
    """Tell this rank's own error: to the terminal, to folder/stacks, and to the other ranks.

    Returns when they know it, so that this process can end: they only notice that the connection breaks. An error
    that turns out to be that of every rank is left to the caller, who tells it once.
    """
    failure = Failure(watchdog.rank, type(error).__name__, " ".join(str(error).split()))
    store = watchdog.store
    assert store is not None
    others = [rank for rank in range(store.world_size) if rank != store.rank]
    with suppress(RuntimeError):  # the store is gone where rank 0 has ended already
        store.set("error", failure.same_for_all)
        store.set(FAILED, "known")
        store.broadcast(FAILED, json.dumps(asdict(failure)))
        _wait_for_ranks(store, "error", others, COMMON_ERROR_S)
        if store.rank_values("error", others) == [failure.same_for_all] * len(others):
            if isinstance(error, HpcSupconError):
                error.on_all_ranks = True
        else:
            print_line(f"error: {failure.to_error()}")
            if isinstance(error, HpcSupconError):
                error.is_printed = True
            if watchdog.folder is not None and watchdog.folder.is_dir():
                write_stacks(watchdog, str(failure.to_error()), error)
            _wait_for_ranks(store, FAILED, others)
        store.set("told", "yes")
        if store.rank == 0:  # which may host the store, in which the others read
            failed = [rank for rank in others if store.rank_values("error", [rank]) is not None]
            _wait_for_ranks(store, "told", failed)
            time.sleep(POLL_INTERVAL_S)


def failure_of_another_rank(watchdog: Watchdog) -> HpcSupconError | None:
    """The error that another rank has reported, if any; printed already where that rank runs on this host."""
    if watchdog.failure is None or watchdog.failure.rank == watchdog.rank:
        return None
    error = watchdog.failure.to_error()
    error.on_all_ranks = True
    error.is_printed = _is_on_this_host(watchdog, watchdog.failure.rank)
    return error


def _is_on_this_host(watchdog: Watchdog, rank: int) -> bool:
    return bool(watchdog.processes) and watchdog.processes[rank].split()[0] == socket.gethostname()


def _wait_for_ranks(store: RankStore, key: str, ranks: list[int], timeout_s: float | None = None) -> None:
    """Wait until all these ranks have set `key`, for at most timeout_s; None: RANKS_TIMEOUT_S."""
    deadline = time.monotonic() + (RANKS_TIMEOUT_S if timeout_s is None else timeout_s)
    while store.rank_values(key, ranks) is None and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_S)


def write_stacks(watchdog: Watchdog, reason: str, error: BaseException | None = None) -> str:
    """Write every thread's stack to folder/stacks/rank-R.txt, or to stderr without a folder; returns where."""
    if watchdog.folder is None:
        faulthandler.dump_traceback(sys.stderr)
        return "stderr"
    path = watchdog.folder / STACKS / f"rank-{watchdog.rank}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {reason}\n\n")
            if error is not None:
                traceback.print_exception(error, file=file)
                file.write("\n")
            file.flush()
            faulthandler.dump_traceback(file)
    except OSError as write_error:
        print_line(f"stacks not written to {path}: {write_error.strerror}")
        faulthandler.dump_traceback(sys.stderr)
        return "stderr"
    return str(path)


def print_line(line: str) -> None:
    """Write one line to stderr; may be called from any thread."""
    sys.stderr.write(f"hpc-supcon: {line}\n")
    sys.stderr.flush()
