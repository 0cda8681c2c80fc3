"""The command `hpc-supcon prune`: pruned copies of a run's encoder, fine-tuned, probed, their size measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..run_folder import read_config
from ..terminal import output
from .common import Debug, refused_together, started


def prune(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder with a trained encoder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Settings, such as prune.rate=[0.2,0.5].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume prunings that were started before.")] = False,
    debug: Debug = False,
) -> None:
    """Prune a run's encoder to each rate of prune.rate, into RUN_DIR/pruned/; fine-tune, probe, measure its size."""
    with refused_together():
        settings = read_config(run_dir, overrides or [], stages=("prune",))
        from ..evaluation.encoder import check_has_encoder
        from ..stages.prune import check_prune
        from ..stages.prune import prune as prune_run

        check_prune(run_dir, settings, resume=resume)
        check_has_encoder(run_dir)  # before decoding the data, which takes minutes
    command = {"command": "prune", "RUN_DIR": run_dir.absolute(), "--resume": "yes" if resume else "no"}
    with started(settings, ("prune",), command, resume=True, folder=run_dir) as (runtime, data):
        from ..stages.results import ResultWriter

        writer = ResultWriter()
        results = prune_run(run_dir, settings, runtime, data, resume=resume, writer=writer)
        if runtime.is_main:
            _print(run_dir, results)
        writer.check()


def _print(run_dir: Path, results: list[dict[str, Any]]) -> None:
    """A row for each rate and probe; "x" is how many times smaller than the dense file."""
    first = results[0]
    about = first["prune"]
    table = Table(
        title=f"{first['encoder']}, {first['loss']} ({about['dense_checkpoint']}): {about['method']}, "
        f"{about['scope']}, of {about['weights']:,} weights",
        caption=f"the encoder as dense safetensors: {first['size']['dense_bytes']:,} bytes",
        caption_justify="left",
    )
    for heading in ("rate", "zeros", "gzip bytes", "x", "sparse bytes", "x", "probe", "validation", "test"):
        table.add_column(heading, justify="left" if heading == "probe" else "right", no_wrap=True)
    for result in results:
        size = result["size"]
        scores = (result[split] for split in ("validation", "test"))
        table.add_row(
            f"{result['prune']['rate']:g}",
            f"{result['prune']['zeros']:,}",
            *(f"{size['gzip_bytes']:,}", f"{size['ratio_gzip']:.2f}"),
            *(f"{size['sparse_bytes']:,}", f"{size['ratio_sparse']:.2f}"),
            result["probe"],
            *("" if score is None else f"{score['accuracy']:.4f}" for score in scores),
        )
    console = output()
    console.print(table)
    console.print(f"results: {run_dir / 'results.json'}", soft_wrap=True)
