"""The lock of a run folder, for all ranks of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..run_lock import run_lock
from .collectives import propagate_errors
from .launch import Runtime


@contextmanager
def locked(folder: Path, runtime: Runtime, warn: Callable[[str], None]) -> Iterator[None]:
    """Inside, no other run writes in `folder`: rank 0 has `run_lock`. Collective.

    Raises on all ranks what run_lock raises.
    """
    with ExitStack() as stack:
        with propagate_errors():
            if runtime.is_main:
                stack.enter_context(run_lock(folder, warn))
        yield
