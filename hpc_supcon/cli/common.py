"""What several commands share: options and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ..terminal import progress_bar

Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="Settings to change, such as optim.lr=0.1.")
]


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
