"""How a rank ends the others: it sends a message, wakes up stopped processes and kills those that stay silent."""

from __future__ import annotations

import signal
import threading

import pytest

from hpc_supcon.distributed import abort
from hpc_supcon.distributed.watchdog import Watchdog


class Store:
    """That of rank 1 of 4. Ranks 0 and 2 write their stacks when they get the message, if they are not stopped, and
    when they are woken up if they are. Rank 3 never does."""

    rank, world_size = 1, 4

    def __init__(self, stopped):
        self.events, self.written, self.stopped = [], set(), set(stopped)
        self.answers = threading.Event()  # the store is in the process of rank 0
        if 0 not in stopped:
            self.answers.set()

    def set(self, key, value):
        self.answers.wait()
        self.events.append(f"set {key}")

    def broadcast(self, key, value):
        self.events.append(f"broadcast {key} {value}")
        self.written |= {0, 2} - self.stopped

    def rank_values(self, key, ranks):
        return ["written"] * len(ranks) if set(ranks) <= self.written else None

    def signal(self, watchdog, ranks, number):
        self.events.append((number, sorted(ranks)))
        if number == signal.SIGCONT:
            self.written |= ranks & {0, 2}
            self.stopped -= ranks
            self.answers.set()

    def wait(self, store, key, ranks):
        """In place of abort._wait_for_ranks."""
        self.events.append(("wait", ranks))


@pytest.fixture
def end_others(monkeypatch):
    """end_others(stopped ranks) -> what rank 1 does to end the other three."""

    def run(stopped, **replaced):
        store, watchdog = Store(stopped), Watchdog()
        watchdog.processes = [0, 1, 2, 3]
        monkeypatch.setattr(abort, "is_stopped", lambda process: process in store.stopped)
        monkeypatch.setattr(abort, "_signal_local", store.signal)
        monkeypatch.setattr(abort, "_wait_for_ranks", store.wait)
        monkeypatch.setattr(abort, "STORE_TIMEOUT_S", 0.2 if 0 in stopped else 60)
        for name, value in replaced.items():
            monkeypatch.setattr(store, name, value)
        abort._end_others(watchdog, store, "why")
        return store.events

    return run


MESSAGES = ["set stacks", "broadcast abort why"]
KILLED = (signal.SIGKILL, [3])


def test_ranks_that_run_write_their_stacks_before_a_stopped_one_is_woken_up(end_others):
    """Otherwise they would leave the call in which they wait for it, and their stacks would not show it."""
    woken = [("wait", [0, 3]), (signal.SIGCONT, [2]), ("wait", [2])]
    assert end_others(stopped=[2]) == [*MESSAGES, *woken, KILLED]


def test_a_stopped_process_that_hosts_the_store_is_woken_up_first(end_others):
    woken = (signal.SIGCONT, [0, 2, 3])
    assert end_others(stopped=[0]) == [woken, *MESSAGES, ("wait", [0, 2, 3]), KILLED]


def test_without_stopped_ranks_only_a_silent_one_is_killed(end_others):
    assert end_others(stopped=[]) == [*MESSAGES, ("wait", [0, 2, 3]), KILLED]


def test_a_rank_that_loses_the_store_kills_nobody(end_others):
    def lost(key, value):
        raise RuntimeError("Connection reset by peer")

    assert end_others(stopped=[], broadcast=lost) == ["set stacks", (signal.SIGKILL, [])]
