"""Where the ranks leave notes for each other without meeting: the process group's key-value store.

Unlike a collective, a note costs its reader nothing until it is read, and a thread can read it while the main
thread hangs.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

ASKED, LEAVE, LOST = "asked", "leave", "lost"
"""Notes to all: why to leave at the next common step; that all leave at once; why all end."""
COMMON = (ASKED, LEAVE, LOST)
_NOTHING = "-"


class Board:
    """This rank's access, one for each thread. Every method talks to the store, for some tens of microseconds, and
    raises RuntimeError when it is gone."""

    def __init__(self) -> None:
        """On the default process group; every rank makes one."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # a connection of its own: another thread's waiting must not hold this one up
        self._store: Any = distributed_c10d._get_default_store().clone()
        for note in COMMON:
            self._store.compare_set(_key(note), "", _NOTHING)

    def twin(self) -> Board:
        """The same board for another thread."""
        twin = object.__new__(Board)
        twin.rank, twin.world_size, twin._store = self.rank, self.world_size, self._store.clone()
        return twin

    def post(self, note: str, text: str) -> None:
        """Put up a note to all; the first of its name stays."""
        self._store.compare_set(_key(note), _NOTHING, text)

    def common(self) -> dict[str, str]:
        """The notes to all that are up."""
        texts = self._store.multi_get([_key(note) for note in COMMON])
        return {note: text.decode() for note, text in zip(COMMON, texts, strict=True) if text.decode() != _NOTHING}

    def write(self, about: str, text: str) -> None:
        """Put up, or change, this rank's own note."""
        self._store.set(_key(about, self.rank), text)

    def own(self, about: str, ranks: list[int] | None = None) -> list[str] | None:
        """The own notes of these ranks (default: all), in their order; None while one is missing."""
        keys = [_key(about, rank) for rank in (range(self.world_size) if ranks is None else ranks)]
        return [text.decode() for text in self._store.multi_get(keys)] if self._store.check(keys) else None


def _key(note: str, rank: int | None = None) -> str:
    return f"hpc_supcon/{note}" if rank is None else f"hpc_supcon/{note}/{rank}"


def who() -> str:
    """This process, as its neighbors can find it: host, number, and when it began (numbers are used again)."""
    return f"{socket.gethostname()} {os.getpid()} {_began(os.getpid())}"


def neighbor(text: str) -> int | None:
    """The process of `who()`'s text where it is alive and on this host, else None."""
    host, pid, began = text.split()
    return int(pid) if host == socket.gethostname() and began != "?" and _began(int(pid)) == began else None


def _began(pid: int) -> str:
    """Clock ticks since boot, from field 22 of /proc/PID/stat; "?" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "?"
