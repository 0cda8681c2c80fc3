"""Preemption: SIGTERM and SIGUSR2 set a flag, and their handlers do nothing else.

Schedulers send one of them some time before they kill a job. The watchdog then has the current step completed, the
state saved by all ranks together, and the processes exit with errors.Preempted.exit_code.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

_reasons: list[str] = []
_interrupts: list[int] = []
"""The SIGINTs since `handle_interrupts` began."""


def requested() -> str | None:
    """The signal that preempts this run, such as "SIGUSR2" or "SIGTERM on rank 3"; None if there was none."""
    return _reasons[0] if _reasons else None


def request(reason: str) -> None:
    """Preempt this run. May be called from any thread; the first reason is kept."""
    if not _reasons:
        _reasons.append(reason)


@contextmanager
def handle_signals() -> Iterator[int | None]:
    """Inside, SIGNALS call `request` instead of ending the process. Afterwards the previous handlers are back.

    Yields a file descriptor to which the number of every signal is written at once, so that a thread can read it: the
    handlers themselves run only when the main thread returns from C code, which can take minutes in a collective.
    Outside the main thread, where Python allows no handlers, it does nothing and yields None.
    """
    if threading.current_thread() is not threading.main_thread():
        yield None
        return

    def handler(number: int, _: FrameType | None) -> None:
        request(signal.Signals(number).name)

    _reasons.clear()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    os.set_blocking(read_end, False)
    old_handlers = {number: signal.signal(number, handler) for number in SIGNALS}
    old_wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield read_end
    finally:
        signal.set_wakeup_fd(old_wakeup)
        for number, old_handler in old_handlers.items():
            signal.signal(number, old_handler)
        os.close(read_end)
        os.close(write_end)
        _reasons.clear()


def interrupted() -> bool:
    """Whether Ctrl-C was pressed in a `handle_interrupts` block."""
    return bool(_interrupts)


@contextmanager
def handle_interrupts() -> Iterator[None]:
    """Inside, the first SIGINT (Ctrl-C, a notebook's stop button) only sets the flag `interrupted`, so that the step
    under way can be completed and saved; a second one raises KeyboardInterrupt at once. Afterwards the previous
    handler is back.

    Outside the main thread, and where SIGINT is ignored or another program handles it, nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handler(number: int, _: FrameType | None) -> None:
        _interrupts.append(number)
        if len(_interrupts) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _interrupts.clear()
