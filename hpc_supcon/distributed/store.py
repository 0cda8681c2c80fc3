"""Messages between ranks without a collective: keys and values in the process group's key-value store.

Reading the store takes tens of microseconds and does not wait for other ranks, so that a thread can use it while
the main thread hangs in a collective.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from torch.distributed import distributed_c10d

from ..process import START_TIME, STATE, UNKNOWN, process_field

PREEMPTED, EXIT, ABORT, FAILED = "preempted", "exit", "abort", "failed"
"""Messages to all ranks. PREEMPTED: save and exit after the next common step (value: the signal). EXIT: rank 0 has
saved, exit at once. ABORT: end at once (value: what failed). FAILED: a rank ends with an error of its own (value: see
watchdog.Failure)."""
SHARED = (PREEMPTED, EXIT, ABORT, FAILED)
_UNSET = "-"


class RankStore:
    """This rank's connection to the store; each thread needs its own. Every method raises RuntimeError when the
    store cannot be reached any more."""

    def __init__(self, rank: int, world_size: int) -> None:
        """Connect to the store of the default process group, as every rank must."""
        self.rank, self.world_size = rank, world_size
        # not the process group's own connection, on which another thread may wait
        self._store: Any = distributed_c10d._get_default_store().clone()
        for key in SHARED:
            self._store.compare_set(_path(key), "", _UNSET)

    def clone(self) -> RankStore:
        """A second connection, for another thread."""
        clone = object.__new__(RankStore)
        clone.rank, clone.world_size, clone._store = self.rank, self.world_size, self._store.clone()
        return clone

    def broadcast(self, key: str, value: str) -> None:
        """Send a message to all ranks. If one with this key was sent before, that one stays."""
        self._store.compare_set(_path(key), _UNSET, value)

    def shared(self) -> dict[str, str]:
        """The messages that were broadcast so far."""
        values = [value.decode() for value in self._store.multi_get([_path(key) for key in SHARED])]
        return {key: value for key, value in zip(SHARED, values, strict=True) if value != _UNSET}

    def set(self, key: str, value: str) -> None:
        """Set or replace this rank's value of `key`."""
        self._store.set(_path(key, self.rank), value)

    def rank_values(self, key: str, ranks: list[int] | None = None) -> list[str] | None:
        """The values of `key` of these ranks (default: all), in their order; None while one of them is not set."""
        paths = [_path(key, rank) for rank in (range(self.world_size) if ranks is None else ranks)]
        return [value.decode() for value in self._store.multi_get(paths)] if self._store.check(paths) else None


def _path(key: str, rank: int | None = None) -> str:
    return f"hpc_supcon/{key}" if rank is None else f"hpc_supcon/{key}/{rank}"


def process_id() -> str:
    """This process for ranks on the same host: host name, pid and start time (the kernel reuses pids)."""
    return f"{socket.gethostname()} {os.getpid()} {process_field(os.getpid(), START_TIME)}"


def local_pid(process: str) -> int | None:
    """The pid of a process (as `process_id` returns it) that is alive on this host, else None."""
    host, pid, started = process.split()
    is_here = host == socket.gethostname() and started != UNKNOWN and process_field(int(pid), START_TIME) == started
    return int(pid) if is_here else None


def is_stopped(process: str) -> bool:
    """Whether a process (as `process_id` returns it) is on this host and stopped, as by SIGSTOP."""
    pid = local_pid(process)
    return pid is not None and process_field(pid, STATE) == "T"
