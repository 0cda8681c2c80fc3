"""The command `hpc-supcon init`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ..config import load_config
from ..errors import ConfigError, printable, unknown_name
from ..files import check_output, write_atomically
from .common import Debug

if TYPE_CHECKING:
    from ..stages.first_recipe import DataFacts, Objective

MIN_MINUTES = 0.1
OBJECTIVES = ("supcon", "tcl", "cross_entropy", "simclr")
Folder = Annotated[Path | None, typer.Argument(metavar="DATA", help="The folder of the data.")]


def _objective(answer: str) -> str:
    if answer not in OBJECTIVES:
        raise typer.BadParameter(unknown_name("objective", answer, OBJECTIVES))
    return answer


def _minutes(answer: str) -> float:
    try:
        minutes = float(answer)
    except ValueError:
        raise typer.BadParameter(f"{answer!r} is not a number") from None
    if not MIN_MINUTES <= minutes < float("inf"):
        raise typer.BadParameter(f"{answer} is not a number from {MIN_MINUTES}")
    return minutes


def init(
    data: Folder = None,
    objective: Annotated[str | None, typer.Option(help=f"{' | '.join(OBJECTIVES)}; simclr needs no labels.")] = None,
    mirrored: Annotated[
        bool | None,
        typer.Option("--mirrored/--not-mirrored", help="Whether a mirrored image is as good as the image."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(parser=_minutes, metavar="FLOAT", help="About how long the run may take here; at least 0.1."),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The recipe's file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    debug: Debug = False,
) -> None:
    """Look at a data folder and write a first recipe for it and for this machine. Asks for what no option says."""
    # a "!" in a notebook has a terminal, but nobody can type there
    asks = sys.stdin.isatty() and "JPY_PARENT_PID" not in os.environ
    if data is None and not asks:
        raise ConfigError("init: name the folder of the data: hpc-supcon init DATA")
    import torch

    from ..stages.first_recipe import look_at, recipe, to_yaml

    root = data or Path(typer.prompt("Folder of the data"))
    facts = look_at(root)
    sys.stdout.write(f"{_line(facts)}\n")
    default = "supcon" if facts.labeled else "simclr"
    question = f"Objective ({', '.join(OBJECTIVES)})"
    chosen = objective or (typer.prompt(question, default, value_proc=_objective) if asks else default)
    if chosen not in OBJECTIVES:
        raise ConfigError(f"--objective: {unknown_name('objective', chosen, OBJECTIVES)}")
    if chosen != "simclr" and not facts.labeled:
        raise ConfigError(f"--objective {chosen} needs labels, and {root} has none: simclr trains without")
    if mirrored is None:
        # letters and digits are other ones in the mirror
        natural = facts.channels == 3
        mirrored = typer.confirm("May images be mirrored?", natural) if asks else natural
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if minutes is None:
        minutes = float(typer.prompt("Minutes it may take", 15.0, value_proc=_minutes)) if asks else 15.0
    path = out or Path(typer.prompt("File of the recipe", "recipe.yaml") if asks else "recipe.yaml")
    check_output(path, force=force)
    settings = recipe(facts, cast("Objective", chosen), mirrored=mirrored, minutes=minutes, device=device)
    write_atomically(path, to_yaml(settings, facts))
    load_config(str(path), [], stages=("pretrain", "probe"))
    command = "run" if facts.labeled else "pretrain"
    sys.stdout.write(f"wrote {printable(path)}; start it: hpc-supcon {command} {printable(path)}\n")


def _line(facts: DataFacts) -> str:
    classes = f"{len(facts.classes)} classes" if facts.labeled else "no labels"
    size = f"{facts.side} px" if facts.uniform else f"mixed sizes, median {facts.side} px"
    color = "gray" if facts.channels == 1 else "color"
    return f"{printable(facts.root)}: {facts.source}, {facts.images:,} training images, {classes}, {size}, {color}"
