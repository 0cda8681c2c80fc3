"""The threads of the watchdog and the blocks in which they run: one for this process, one for the other ranks."""

from __future__ import annotations

import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from ..errors import HpcSupconError, Preempted, RankLost, first_line
from . import preemption
from .abort import (
    abort_all_ranks,
    exit_lock,
    failure_of_another_rank,
    print_line,
    report_failure,
    save_and_exit,
    write_stacks,
)
from .launch import Runtime
from .store import ABORT, EXIT, FAILED, PREEMPTED, RankStore, process_id
from .watchdog import Failure, Watchdog, set_current_watchdog

CHECK_INTERVAL_S = 0.25
"""Between two checks of this process."""
EXCHANGE_INTERVAL_S = 0.5
"""Between two exchanges of messages; each is two requests to the store (in rank 0 or in the launcher)."""
JOIN_TIMEOUT_S = 5.0
"""How long the main thread waits for a monitor to end."""
FAILED_S = 10.0
"""How long a rank may take to end by itself after another rank has told its error."""
STORE_LOST_S = 10.0
"""How long a rank that cannot reach the store goes on: at the end of a run, rank 0 may be the first to exit."""


@contextmanager
def start_watchdog(folder: Path, *, step_timeout_s: float, first_step_timeout_s: float) -> Iterator[Watchdog]:
    """Inside, signals and a hanging main thread are handled, and `current_watchdog` returns this watchdog.

    step_timeout_s, first_step_timeout_s: the longest a training step, and the first one, may take. If one takes
    longer, or a rank gives no sign of life for step_timeout_s, all ranks end with RankLost's exit code; their stacks
    are in folder/stacks.
    """
    watchdog = Watchdog(folder, step_timeout_s=step_timeout_s, first_step_timeout_s=first_step_timeout_s)
    with preemption.handle_signals() as signal_fd:
        previous = set_current_watchdog(watchdog)
        monitor = LocalMonitor(watchdog, signal_fd)
        monitor.start()
        try:
            yield watchdog
        finally:
            monitor.stop()
            set_current_watchdog(previous)


@contextmanager
def monitor_ranks(watchdog: Watchdog, runtime: Runtime) -> Iterator[None]:
    """Inside, the ranks of the process group monitor each other.

    An error that this rank alone has is told to the others. When the connection to another rank breaks, raises the
    error that it has told, else RankLost, after this rank's stacks were written.
    """
    watchdog.rank, watchdog.device = runtime.rank, runtime.device
    if runtime.world_size == 1:
        yield
        return
    watchdog.store = RankStore(runtime.rank, runtime.world_size)
    watchdog.store.set("process", process_id())
    monitor = RankMonitor(watchdog, watchdog.store.clone())
    monitor.start()
    try:
        yield
    except Exception as error:
        if not isinstance(error, RuntimeError) or not _is_broken_connection(error):
            if not (isinstance(error, HpcSupconError) and error.on_all_ranks):
                report_failure(watchdog, error)
            raise
        if (failure := failure_of_another_rank(watchdog)) is not None:
            raise failure from error
        reason = first_line(error)[:160]
        with exit_lock:
            path = write_stacks(watchdog, reason, error)
        where = f"{watchdog.current_phase.name}, after step {watchdog.step}"
        raise RankLost(
            f"rank {watchdog.rank}: another rank was lost ({where}: {reason}); stacks: {path}; "
            "start again with --resume"
        ) from error
    finally:
        monitor.stop()
        watchdog.store = None


def _is_broken_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl"))


class _Clock:
    """Seconds that leave out the time in which this process is suspended (SIGSTOP, scontrol suspend)."""

    def __init__(self) -> None:
        self._last, self.now = time.monotonic(), 0.0

    def tick(self) -> None:
        now = time.monotonic()
        self.now += min(now - self._last, 2.0)
        self._last = now


class _Unchanged:
    """How long a value has not changed, by a clock."""

    def __init__(self, clock: _Clock) -> None:
        self._clock, self._value, self._since = clock, "", 0.0

    def seconds(self, value: object) -> float:
        if str(value) != self._value:
            self._value, self._since = str(value), self._clock.now
        return self._clock.now - self._since


class _Monitor(threading.Thread):
    def __init__(self, name: str, watchdog: Watchdog) -> None:
        super().__init__(name=name, daemon=True)
        self._watchdog, self._clock, self._stopped = watchdog, _Clock(), threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        self.join(JOIN_TIMEOUT_S)


class LocalMonitor(_Monitor):
    """Reads signals as they arrive, and detects when the main thread or the RankMonitor makes no progress.

    It never waits for another rank.
    """

    def __init__(self, watchdog: Watchdog, signal_fd: int | None) -> None:
        super().__init__("local-monitor", watchdog)
        self._signal_fd = signal_fd
        # only torchrun's workers: other launchers may end before the ranks do
        self._torchrun_pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def run(self) -> None:
        watchdog, is_exiting = self._watchdog, False
        progress, exchanges = _Unchanged(self._clock), _Unchanged(self._clock)
        while not self._stopped.is_set():
            self._clock.tick()
            phase, seconds = watchdog.current_phase, progress.seconds(watchdog.progress)
            if phase.timeout_s is not None and seconds > phase.timeout_s:
                abort_all_ranks(
                    watchdog,
                    f"rank {watchdog.rank}: {phase.name}: step {watchdog.step + 1} took over {phase.timeout_s:g} s",
                )
            limit, seconds = watchdog.step_timeout_s, exchanges.seconds(watchdog.exchanges)
            if watchdog.store is not None and limit is not None and seconds > limit:
                abort_all_ranks(
                    watchdog, f"rank {watchdog.rank}: rank 0 or the launcher did not answer for {limit:g} s"
                )
            if self._torchrun_pid not in (None, os.getppid()):
                abort_all_ranks(watchdog, f"rank {watchdog.rank}: torchrun was killed")
            if preemption.requested() is not None and watchdog.store is None and not is_exiting:
                is_exiting = save_and_exit(watchdog, None)
            self._wait_for_signals()

    def _wait_for_signals(self) -> None:
        if self._signal_fd is None:
            self._stopped.wait(CHECK_INTERVAL_S)
        elif select.select([self._signal_fd], [], [], CHECK_INTERVAL_S)[0]:
            for number in os.read(self._signal_fd, 1024):
                if number in preemption.SIGNALS:
                    preemption.request(signal.Signals(number).name)


class RankMonitor(_Monitor):
    """Exchanges messages with the other ranks and acts on them."""

    def __init__(self, watchdog: Watchdog, store: RankStore) -> None:
        super().__init__("rank-monitor", watchdog)
        self._store = store
        self._is_preemption_sent = self._is_exiting = False
        # rank 0 monitors all ranks, all others monitor rank 0
        self._monitored = list(range(1, store.world_size) if store.rank == 0 else range(1))
        self._failed = _Unchanged(self._clock)
        self._alive = {rank: _Unchanged(self._clock) for rank in self._monitored}

    def run(self) -> None:
        while not self._stopped.is_set():
            self._clock.tick()
            try:
                if self._watchdog.failure is None:
                    self._exchange()
                else:  # the store may be gone
                    self._after_failure()
            except RuntimeError as error:
                self._store_lost(error)
                return
            self._watchdog.exchanges += 1
            self._stopped.wait(EXCHANGE_INTERVAL_S)

    def _exchange(self) -> None:
        watchdog, store = self._watchdog, self._store
        store.set("alive", str(watchdog.exchanges))
        messages = store.shared()
        if ABORT in messages:
            abort_all_ranks(watchdog, messages[ABORT], received=True)
        if EXIT in messages and store.rank:
            store.set("exiting", "yes")
            os._exit(Preempted.exit_code)
        if FAILED in messages:
            watchdog.failure = Failure(**json.loads(messages[FAILED]))
            store.set(FAILED, "known")
            return
        if PREEMPTED in messages:
            preemption.request(messages[PREEMPTED])
        elif (reason := preemption.requested()) and not self._is_preemption_sent:
            store.broadcast(PREEMPTED, f"{reason} on rank {store.rank}")
            self._is_preemption_sent = True
        if preemption.requested() is not None and store.rank == 0 and not self._is_exiting:
            self._is_exiting = save_and_exit(watchdog, store)
        if not watchdog.processes:
            watchdog.processes = store.rank_values("process") or []
        self._check_others()

    def _after_failure(self) -> None:
        """Another rank has ended, or this one is about to. The main thread usually notices a broken connection; a
        collective on a GPU may wait for ever instead."""
        seconds = self._failed.seconds("failed")
        error = failure_of_another_rank(self._watchdog)
        if error is not None and seconds > FAILED_S:
            with exit_lock:
                if not error.is_printed:
                    print_line(f"error: {error}")
                os._exit(error.exit_code)

    def _check_others(self) -> None:
        limit = self._watchdog.step_timeout_s
        values = self._store.rank_values("alive", self._monitored)
        for rank, value in zip(self._monitored, values or [], strict=bool(values)):
            if limit is not None and self._alive[rank].seconds(value) > limit:
                abort_all_ranks(self._watchdog, f"rank {rank} gave no sign of life for {limit:g} s")

    def _store_lost(self, error: RuntimeError) -> None:
        if not self._stopped.wait(STORE_LOST_S):
            reason = first_line(error)[:160]
            abort_all_ranks(self._watchdog, f"rank {self._watchdog.rank}: rank 0 or the launcher was lost ({reason})")
