"""Being asked to leave: SIGTERM and SIGUSR2 set a flag, and nothing else happens in their handlers.

Schedulers send one of them some time before they kill a job. What is done about it, and when, is the watch's
business (watchdog.py): a step is finished, the state is saved by all ranks together, and the process leaves
with EXIT_CODE, which says "start me again".
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later."""

_reasons: list[str] = []


def requested() -> str | None:
    """What asked this run to leave, such as "SIGUSR2" or "SIGTERM on rank 3"; None while nothing has."""
    return _reasons[0] if _reasons else None


def request(reason: str) -> None:
    """Ask this run to leave; the first reason stays. From any thread."""
    if not _reasons:
        _reasons.append(reason)


@contextmanager
def listening() -> Iterator[int | None]:
    """Inside, the signals are heard and survived, however often they come; afterwards all is as before.

    Yields a file descriptor on which every signal's number arrives at once, for a thread to read: the handlers
    themselves wait until the main thread comes back from C, which in a collective may take minutes. None, and no
    handlers, outside the main thread (Python allows them nowhere else).
    """
    if threading.current_thread() is not threading.main_thread():
        yield None
        return

    def note(number: int, frame: FrameType | None) -> None:
        request(signal.Signals(number).name)

    _reasons.clear()
    heard, told = os.pipe()
    os.set_blocking(told, False)
    os.set_blocking(heard, False)
    before = {number: signal.signal(number, note) for number in SIGNALS}
    woken = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    try:
        yield heard
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(heard)
        os.close(told)
        _reasons.clear()
