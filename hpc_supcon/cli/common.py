"""What several commands share: options, the start of a command that computes, progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import Config, Stage, check_ranks
from ..terminal import progress_bar, warn

if TYPE_CHECKING:
    from ..distributed.launch import Runtime
    from ..training.data import Data

Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")]


@contextmanager
def started(
    settings: Config, stages: tuple[Stage, ...], *, resume: bool, folder: Path | None = None
) -> Iterator[tuple[Runtime, Data]]:
    """The process group, the lock of the run folder, and the data, for as long as a command runs these stages.

    folder: the run folder, where it need not be the one that the settings name.
    """
    from ..distributed import launch as rt

    check_ranks(settings, rt.resolve().world_size, stages=stages)  # before more is imported, which takes seconds
    from .. import run_folder
    from ..distributed.collectives import propagate_errors
    from ..distributed.folder_lock import locked
    from ..distributed.monitors import monitor_ranks, start_watchdog
    from ..training.data import load_data

    folder = folder or settings.folder
    limits = settings.runtime
    with (
        start_watchdog(
            folder,
            step_timeout_s=limits.timeout_s,
            first_step_timeout_s=limits.first_step_timeout_s,
        ) as watchdog,
        rt.start(
            device=limits.device,
            threads=limits.threads,
            timeout_s=limits.first_step_timeout_s,
            deterministic=settings.deterministic,
            reuse_memory=limits.reuse_memory,
        ) as runtime,
        monitor_ranks(watchdog, runtime),
    ):
        with propagate_errors():
            run_folder.check_usable(settings.folder, settings, resume=resume)  # before minutes of decoding
        with locked(folder, runtime, warn):
            yield runtime, load_data(settings, runtime)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """`update(name, done, total)`: a progress bar for each name; nothing is shown where stderr is no terminal."""
    bars: dict[str, Any] = {}
    with progress_bar() as progress:

        def update(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done, total=total)

        yield update
