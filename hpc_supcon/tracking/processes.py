"""The processes that follow run folders, as the process of a run starts and ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..parts import allowed
from ..terminal import note, warn
from .follow import FINISHED, command

ENDING_S, FINISHING_S, UPLOADING_S = 15, 60, 600
"""Longest time to send what is left: of a run that ended early, of a complete one, of one with its checkpoints."""
QUIET_S, GRACE_S = 10.0, 5.0
"""Time to wait without saying so, and for a process to end by itself after its limit."""


@dataclass
class _Following:
    finishing_s: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    users: int = 0
    is_failed: bool = False


@dataclass(frozen=True)
class _Ending:
    folder: Path
    name: str
    process: subprocess.Popen[bytes]
    until: float
    """time.monotonic() at which it is killed."""


_following: dict[Path, _Following] = {}
_ending: list[_Ending] = []


def follow(folder: Path, names: Sequence[str], artifacts: Sequence[str]) -> None:
    """Start a process for each tracker of `names`, unless they follow this folder already. Pair it with `leave`.

    A process that cannot be started is told, and the run goes on.
    """
    key = folder.absolute()
    found = _following.setdefault(key, _Following(UPLOADING_S if "checkpoints" in artifacts else FINISHING_S))
    found.users += 1
    for name in names:
        if name in found.processes:
            continue
        limits = [str(ENDING_S), str(found.finishing_s), ",".join(allowed())]
        try:
            found.processes[name] = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "hpc_supcon.tracking", str(folder), name, *limits, *artifacts],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the run
            )
        except OSError as error:
            warn(f"{name}: its process cannot be started: {error.strerror}; the run goes on without it")


def leave(folder: Path, *, finished: bool) -> None:
    """End what `follow` started, when its last user leaves; does not wait. finished: False after an error."""
    key = folder.absolute()
    found = _following[key]
    found.users -= 1
    found.is_failed |= not finished
    if found.users:
        return
    del _following[key]
    limit_s = ENDING_S if found.is_failed else found.finishing_s
    for name, process in found.processes.items():
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(b"\n" if found.is_failed else FINISHED)
            process.stdin.flush()
        with suppress(BrokenPipeError):
            process.stdin.close()
        _ending.append(_Ending(folder, name, process, time.monotonic() + limit_s + GRACE_S))


@contextmanager
def following(folder: Path, names: Sequence[str], artifacts: Sequence[str]) -> Iterator[None]:
    """`follow` for the block, and all processes have ended after it."""
    follow(folder, names, artifacts)
    finished = False
    try:
        yield
        finished = True
    finally:
        leave(folder, finished=finished)
        wait_for_all()


def wait_for_all() -> None:
    """Until all processes have ended that were told to, or had to."""
    while _ending:
        own = _ending.pop(0)
        try:
            own.process.wait(QUIET_S)
        except subprocess.TimeoutExpired:
            note(f"{own.name}: sending what is left, for up to {own.until - time.monotonic():.0f} s")
        try:
            code = own.process.wait(max(0.0, own.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
            with suppress(ProcessLookupError):
                os.killpg(own.process.pid, signal.SIGKILL)
            own.process.wait()
        if code != 0:
            why = "did not end and was killed" if code is None else f"ended with exit code {code}"
            warn(f"{own.name}: its process {why}; `{command(own.folder, own.name)}` sends what is missing")
