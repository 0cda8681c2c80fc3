"""How a command that computes starts: process group, run folder, data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .config import Config

if TYPE_CHECKING:
    from .runtime import Runtime
    from .training.assemble import Data


@contextmanager
def started(settings: Config, resume: bool) -> Iterator[tuple[Runtime, Data]]:
    """The process group and the data, for the length of a command."""
    from . import runtime as rt
    from .collectives import together
    from .training import assemble, run_folder
    from .training.watchdog import connected, watching

    limits = settings.runtime
    with (
        watching(settings.folder, step_s=limits.timeout_s, first_step_s=limits.first_step_timeout_s) as watch,
        rt.start(
            device=limits.device,
            threads=limits.threads,
            timeout_s=limits.first_step_timeout_s,
            deterministic=settings.deterministic,
            reuse_memory=limits.reuse_memory,
        ) as runtime,
        connected(watch, runtime),
    ):
        with together():
            run_folder.check_usable(settings.folder, settings, resume=resume)  # before minutes of decoding
        yield runtime, assemble.load_data(settings, runtime)
