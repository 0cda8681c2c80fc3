"""The command `hpc-supcon doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..terminal import output
from .common import Debug

MARKS = {"ok": "ok", "absent": "-", "problem": "!"}


def doctor(
    folder: Annotated[Path, typer.Option(help="Folder whose storage is measured.")] = Path(),
    debug: Debug = False,
) -> None:
    """What this machine has and lacks: GPUs, NCCL, Slurm, storage, optional packages, each with the remedy."""
    from ..bench.doctor import findings

    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    for found in findings(folder):
        table.add_row(MARKS[found.status], found.topic, found.text, found.remedy)
    output().print(table, markup=False)
