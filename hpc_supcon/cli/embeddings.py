"""The command `hpc-supcon embeddings`: maps of a run's embeddings, and nearest neighbors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from ..config import check_report
from ..run_folder import read_config
from ..stages.start import refused_together, started
from ..terminal import output
from .common import Debug, Overrides

if TYPE_CHECKING:
    from ..evaluation.map_figures import FittedMap


def embeddings(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")],
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Draw maps of a run's images (PCA, t-SNE, UMAP), before and after training, and nearest neighbors.

    Into RUN_DIR/embeddings: a .npz, .png and .svg of each map, overview.png of all, and neighbors.png. Settings:
    section report.
    """
    with refused_together():
        settings = read_config(run_dir, overrides or [])
        check_report(settings)
        from ..evaluation.maps import missing_packages
        from ..evaluation.spaces import check_has_checkpoint

        for error in missing_packages(settings.report.methods).values():
            raise error
        check_has_checkpoint(run_dir, settings)  # before minutes of decoding
    command = {"command": "embeddings", "RUN_DIR": run_dir.absolute()}
    with started(settings, (), command, resume=True, folder=run_dir) as (runtime, data):
        from ..stages.embeddings import FOLDER, draw_embeddings
        from ..stages.results import ResultWriter

        writer = ResultWriter()
        maps = draw_embeddings(run_dir, settings, runtime, data, writer=writer)
        if runtime.is_main:
            _print(run_dir / FOLDER, maps)
        writer.check()


def _print(folder: Path, maps: list[FittedMap]) -> None:
    """A row for each map."""
    table = Table("map", "method", Column("trustworthiness", justify="right"), "file")
    for drawn in maps:
        table.add_row(drawn.title, drawn.method, f"{drawn.trustworthiness:.3f}", f"{drawn.name}.png")
    console = output()
    console.print(table)
    console.print(f"overview: {folder / 'overview.png'}", soft_wrap=True)
