"""How a rank ends the others: it sends a message, wakes up stopped processes and kills those that stay silent."""

from __future__ import annotations

import signal
import threading

import pytest

from hpc_supcon.distributed import abort
from hpc_supcon.distributed.watchdog import Watchdog


class Store:
    """That of rank 1 of 4. Rank 0 has written its stacks, rank 2 does so when it is woken up, rank 3 never does."""

    rank, world_size = 1, 4

    def __init__(self, is_stopped):
        self.events, self.written = [], {0, 1}
        self.woken, self.answers = threading.Event(), threading.Event()
        if not is_stopped:
            self.answers.set()

    def set(self, key, value):
        self.answers.wait()
        self.events.append(f"set {key}")

    def broadcast(self, key, value):
        self.events.append(f"broadcast {key} {value}")

    def rank_values(self, key, ranks):
        return ["written"] * len(ranks) if set(ranks) <= self.written else None

    def signal(self, watchdog, ranks, number):
        self.events.append((number, sorted(ranks)))
        if number == signal.SIGCONT:
            self.written.add(2)
            self.answers.set()
            self.woken.set()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_stopped_rank_is_woken_up_after_the_message_was_sent_and_killed_if_it_stays_silent(monkeypatch, is_stopped):
    """If the store itself is in a stopped process, that process is woken up first."""
    store = Store(is_stopped)
    monkeypatch.setattr(abort, "_signal_local", store.signal)
    monkeypatch.setattr(abort, "STORE_TIMEOUT_S", 0.2 if is_stopped else 60)
    monkeypatch.setattr(abort, "_wait_for_ranks", lambda *_: store.woken.wait())
    abort._end_others(Watchdog(), store, "why")
    messages = ["set stacks", "broadcast abort why"]
    woken = (signal.SIGCONT, [0, 2, 3])
    assert store.events == [
        *([woken, *messages] if is_stopped else [*messages, woken]),
        (signal.SIGKILL, [3]),
    ]


def test_a_rank_that_loses_the_store_kills_nobody(monkeypatch):
    store = Store(is_stopped=False)
    monkeypatch.setattr(store, "broadcast", lost)
    monkeypatch.setattr(abort, "_signal_local", store.signal)
    monkeypatch.setattr(abort, "STORE_TIMEOUT_S", 0.2)
    abort._end_others(Watchdog(), store, "why")
    assert store.events[-1] == (signal.SIGKILL, [])


def lost(key, value):
    raise RuntimeError("Connection reset by peer")
