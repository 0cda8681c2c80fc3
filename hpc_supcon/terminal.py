"""Text on the terminal: stderr tells what happens, stdout gives what was asked for.

Paths, class names and labels of a user's may contain what rich reads as markup ("[tcl]", ":smile:"). Everything
printed here appears as it is; colors are set by the argument `style`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .errors import OutputError, RunFolderError

WIDTH = 200
"""Columns of a table that is written to a file or a pipe."""

console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def note(line: str) -> None:
    """Print one line to stderr, above a progress bar if there is one."""
    console.print(line, soft_wrap=True)


def warn(line: str) -> None:
    """As `note`, in yellow."""
    console.print(line, soft_wrap=True, style="yellow")


@contextmanager
def only_told() -> Iterator[None]:
    """A RunFolderError or OutputError in the block is printed, no more: for what can be lost, such as a plot."""
    try:
        yield
    except (RunFolderError, OutputError) as error:
        warn(str(error))


def output() -> Console:
    """stdout, for tables and lines that a command was asked for."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False, emoji=False)


def progress_bar() -> Progress:
    """A bar for every task, with its description as it is; nothing is shown where stderr is no terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
