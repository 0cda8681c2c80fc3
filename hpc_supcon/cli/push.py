"""The command `hpc-supcon push`: a run's model for others, as a folder or on the Hugging Face Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import printable
from ..terminal import warn
from .common import Debug


def push(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")],
    to: Annotated[
        str,
        typer.Option("--to", metavar="FOLDER|hf:NAME", help="A folder to make, or a model on the Hugging Face Hub."),
    ],
    license: Annotated[
        str | None, typer.Option("--license", help="License of the weights, such as apache-2.0 or cc-by-4.0.")
    ] = None,
    page: Annotated[
        bool,
        typer.Option("--page/--no-page", help="Add the run's page, which may show images of the data, and paths."),
    ] = True,
    private: Annotated[bool, typer.Option("--private", help="Make the Hub's repository a private one.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that an earlier push wrote.")] = False,
    debug: Debug = False,
) -> None:
    """Write a run's encoder, projection and probes with a model card, for timm, transformers and model.weights."""
    from ..export.pushing import push as push_model

    pushed = push_model(run_dir, to, license=license, page=page, private=private, force=force)
    if license is None:
        warn("no license: the card says that none is given; choose one with --license")
    if pushed.not_timm is None:
        loads = "loaded by timm, transformers and model.weights"
    else:
        loads = f"loaded by model.weights, not by timm or transformers: {pushed.not_timm}"
    sys.stdout.write(f"{printable(pushed.where)}: {len(pushed.files)} files, {pushed.bytes:,} bytes; {loads}\n")
