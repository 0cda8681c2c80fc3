"""What several commands share: options, the start of a command that computes, progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..config import Config, Stage, check_ranks

if TYPE_CHECKING:
    from ..distributed.launch import Runtime
    from ..training.data import Data

Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")]


@contextmanager
def started(settings: Config, stages: tuple[Stage, ...], *, resume: bool) -> Iterator[tuple[Runtime, Data]]:
    """The process group and the data, for as long as a command runs these stages."""
    from ..distributed import launch as rt

    check_ranks(settings, rt.resolve().world_size, stages=stages)  # before more is imported, which takes seconds
    from .. import run_folder
    from ..distributed.collectives import propagate_errors
    from ..distributed.monitors import monitor_ranks, start_watchdog
    from ..training.data import load_data

    limits = settings.runtime
    with (
        start_watchdog(
            settings.folder,
            step_timeout_s=limits.timeout_s,
            first_step_timeout_s=limits.first_step_timeout_s,
        ) as watchdog,
        rt.start(
            device=limits.device,
            threads=limits.threads,
            timeout_s=limits.first_step_timeout_s,
            start_timeout_s=limits.start_timeout_s,
            deterministic=settings.deterministic,
            reuse_memory=limits.reuse_memory,
        ) as runtime,
        monitor_ranks(watchdog, runtime),
    ):
        with propagate_errors():
            run_folder.check_usable(settings.folder, settings, resume=resume)  # before minutes of decoding
        yield runtime, load_data(settings, runtime)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """`update(name, done, total)`: a progress bar for each name; nothing is shown where stderr is no terminal."""
    from rich.progress import Progress

    bars: dict[str, Any] = {}
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:

        def update(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done, total=total)

        yield update
