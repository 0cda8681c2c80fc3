"""The commands `hpc-supcon report` and `hpc-supcon compare`: run folders as one page, and as tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, RunFolderError, printable, unknown_name
from ..terminal import note, only_told, output, warn
from .common import Debug

if TYPE_CHECKING:
    from ..pages.compare import Comparison

FORMATS = ("terminal", "markdown", "latex", "csv")
RunDirs = Annotated[list[Path] | None, typer.Argument(metavar="RUN_DIR...", help="Run folders.")]


def report(
    run_dirs: RunDirs = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The page; by default RUN_DIR/report.html, of several runs ./report.html."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write it again while the runs go on, until Ctrl-C.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write everything that is known of one run or of several into one page, which opens from the disk."""
    folders = _given(run_dirs, "report")
    from ..pages.page import check_page_output, render, write_page
    from ..pages.runs import PAGE, page_of_runs
    from ..pages.watch import watch as watch_runs

    path = out or (folders[0] / PAGE if len(folders) == 1 else Path(PAGE))
    page = page_of_runs(folders)
    check_page_output(path)
    if watch:
        note(f"{path}: follows the runs until Ctrl-C")
        watch_runs(folders, path)
    else:
        write_page(path, render(page))
    for notice in page.notices:
        warn(notice)
    output().print(printable(path), soft_wrap=True)


def compare(
    run_dirs: RunDirs = None,
    format: Annotated[str, typer.Option("--format", help=" | ".join(FORMATS))] = "terminal",
    debug: Debug = False,
) -> None:
    """Scores of runs beside each other. Runs that differ only in their seed are a row; differences are to the first.

    Mean and half width of the 95 % interval over seeds (Student's t); differences are paired by seed.
    """
    if format not in FORMATS:
        raise ConfigError(unknown_name("format", format, FORMATS))
    folders = _given(run_dirs, "compare")
    from ..pages.compare import as_csv, as_latex, as_markdown
    from ..pages.compare import compare as compare_runs
    from ..pages.read import read_runs

    runs = read_runs(folders)
    comparison = compare_runs(runs)
    for notice in [*comparison.notices, *(notice for run in runs for notice in run.notices)]:
        warn(notice)
    if not comparison.sections:
        raise RunFolderError(f"{', '.join(map(str, folders))}: no results yet")
    if format == "terminal":
        _print(comparison)
    else:
        sys.stdout.write({"markdown": as_markdown, "latex": as_latex, "csv": as_csv}[format](comparison))


def _given(run_dirs: list[Path] | None, command: str) -> list[Path]:
    if not run_dirs:
        raise ConfigError(f"which run? hpc-supcon {command} RUN_DIR ..., such as runs/quickstart")
    return run_dirs


def _print(comparison: Comparison) -> None:
    from rich.table import Table
    from rich.text import Text

    from ..pages.compare import NOTE, table_of

    console = output()
    for section in comparison.sections:
        headings, rows = table_of(comparison, section)
        table = Table(title=Text(section), title_justify="left", box=None, pad_edge=False, header_style="bold")
        for i, heading in enumerate(headings):
            table.add_column(Text(heading), justify="right" if i > 1 else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        console.print()
    console.print(NOTE, soft_wrap=True)


def write_own_page(folder: Path) -> None:
    """Write RUN_DIR/report.html at the end of a run, and print its path. What prevents that is only told."""
    from ..pages.page import render, write_page
    from ..pages.runs import PAGE, page_of_runs

    with only_told():
        write_page(folder / PAGE, render(page_of_runs([folder])))
        output().print(f"page: {printable(folder / PAGE)}", soft_wrap=True)
