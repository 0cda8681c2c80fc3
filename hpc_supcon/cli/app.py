"""The root of the command line, and the commands `run | pretrain | probe | config | convert | verify`."""

from __future__ import annotations

import io
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..config import Config, Stage, load_config, schema_rows, to_yaml
from ..distributed.resolve import check_one_process
from ..errors import CorruptSample, HpcSupconError, Preempted
from ..run_folder import read_config
from .bench import bench
from .checkpoints import checkpoints
from .common import Debug, progress_bars, started
from .export import embed, export, predict
from .grid import grid
from .prune import prune

if TYPE_CHECKING:
    from ..distributed.launch import Runtime
    from ..training.data import Data

QUICKSTART = "quickstart"
RUN: tuple[Stage, ...] = ("pretrain", "probe")
"""The stages of `hpc-supcon run`."""

OF_ALL_RANKS = ("run", "pretrain", "probe", "prune")
"""The commands that several processes do together; all others are the work of one."""

app = typer.Typer(
    name="hpc-supcon",
    help="Supervised contrastive learning of images, from one CPU to a Slurm cluster.",
    epilog="Several ranks: torchrun --nproc_per_node N -m hpc_supcon run CONFIG, or srun hpc-supcon run CONFIG. "
    "Exit codes: 0 done; 2 wrong input; 3 NaN or Inf; 4 the loader died; 5 another rank was lost or hangs; 6 out of "
    "memory; 75 preempted (SIGTERM, SIGUSR2) and saved: start again with --resume.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(bench, name="bench")
app.command("checkpoints")(checkpoints)
app.command("prune")(prune)
app.command("export")(export)
app.command("embed")(embed)
app.command("predict")(predict)
app.add_typer(grid, name="grid")

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A recipe's name or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="Settings to change, such as optim.lr=0.1.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume from the run folder's newest checkpoint.")]


@app.command()
def run(
    config: ConfigArgument = QUICKSTART, overrides: Overrides = None, resume: Resume = False, debug: Debug = False
) -> None:
    """Pre-train an encoder, then evaluate it (pretrain + probe). Where all probes read pixels, none is trained."""
    settings = _settings(config, overrides, RUN)
    with started(settings, RUN, resume=resume) as (runtime, data):
        from ..evaluation.probes import check_probes
        from ..stages.probe import probe, start_without_encoder

        check_probes(settings, data.splits)
        if settings.probe.needs_encoder:
            folder = _pretrained(settings, runtime, data, resume)
        else:
            folder = start_without_encoder(settings, runtime)
        results = probe(folder, settings, runtime, data)
        if runtime.is_main:
            _print_results(folder, results)


@app.command("pretrain")
def pretrain_command(
    config: ConfigArgument = QUICKSTART, overrides: Overrides = None, resume: Resume = False, debug: Debug = False
) -> None:
    """Pre-train an encoder into a run folder."""
    settings = _settings(config, overrides, ("pretrain",))
    with started(settings, ("pretrain",), resume=resume) as (runtime, data):
        _pretrained(settings, runtime, data, resume)


def _pretrained(settings: Config, runtime: Runtime, data: Data, resume: bool) -> Path:
    """Pre-train, draw the curves (and an autoencoder's images); returns the run folder. Collective."""
    from ..distributed.collectives import propagate_errors
    from ..evaluation.monitor import online_probe
    from ..evaluation.plots import draw_training_curves
    from ..stages.pretrain import pretrain
    from ..stages.reconstruct import evaluate_autoencoder

    folder = pretrain(settings, runtime, data, resume=resume, online_probe=online_probe(settings, runtime, data))
    with propagate_errors():
        if runtime.is_main:
            draw_training_curves(folder)
    if "reconstruction" in settings.loss.weights:
        evaluate_autoencoder(folder, settings, runtime, data)
    return folder


@app.command("probe")
def probe_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")],
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Evaluate a run folder's encoder, or the pixels, by the probes of probe.kind; writes results.json there."""
    settings = read_config(run_dir, overrides or [], stages=("probe",))
    if settings.probe.needs_encoder:
        from ..evaluation.encoder import check_has_encoder

        check_has_encoder(run_dir)  # before minutes of decoding
    with started(settings, ("probe",), resume=True) as (runtime, data):
        from ..stages.probe import probe

        results = probe(run_dir, settings, runtime, data)
        if runtime.is_main:
            _print_results(run_dir, results)


@app.command("config")
def config_command(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A recipe's name or a YAML file.")] = "default",
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="List every setting: type, default, unit, meaning.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Check a configuration and print it resolved, as YAML; or explain every setting."""
    if not schema:
        sys.stdout.write(to_yaml(_settings(config, overrides, RUN)))
        return
    table = Table("setting", "type", "default", "unit", "meaning", box=None, pad_edge=False, header_style="bold")
    for row in schema_rows():
        table.add_row(*(text.replace("[", r"\[") for text in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@app.command("convert")
def convert_command(
    data: Annotated[str, typer.Argument(metavar="DATA", help="An image folder, or a source such as cifar10.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.beton", help="Writes OUT.train.beton, OUT.test.beton ...")],
    root: Annotated[Path | None, typer.Option(help="Folder of a source other than an image folder.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the source if it is not there.")] = False,
    max_size: Annotated[int | None, typer.Option(help="Longest side in px; larger images are shrunk.")] = None,
    jpeg_quality: Annotated[int | None, typer.Option(help="1..95; by default JPEG files are copied.")] = None,
    raw_fraction: Annotated[float, typer.Option(help="Share of images stored as pixels, 0..1.")] = 0.0,
    debug: Debug = False,
) -> None:
    """Write a data set as .beton files with manifests, for data.loader=ffcv (data.beton=OUT.beton)."""
    from ..data import convert_splits, open_source

    is_folder = "/" in data or Path(data).is_dir()
    name = "image_folder" if is_folder else data
    # a .beton takes mixed sizes: image_size=1 keeps them from being checked, and nothing is resized to it
    splits = open_source(
        name, data if is_folder else root, download=download, image_size=1 if is_folder else None, note=_note
    )
    options = {"max_size": max_size, "jpeg_quality": jpeg_quality, "raw_fraction": raw_fraction}
    with progress_bars() as update:
        manifests = convert_splits(name, splits, out, progress=update, **options)
    for split, manifest in manifests.items():
        sys.stdout.write(f"{split}: {manifest['samples']} images, {manifest['bytes']:,} bytes\n")
    sys.stdout.write(f"use: data.source={name} data.beton={out}\n")


@app.command("verify")
def verify_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An image folder or a .beton file.")],
    debug: Debug = False,
) -> None:
    """Decode every image; list sizes, classes, and each image that training would refuse."""
    from ..data.sources.verify import verify

    with progress_bars() as update:
        reports = verify(path, progress=lambda done, total: update(path.name, done, total), note=_note)
    broken = 0
    for name, report in reports.items():
        sizes = ", ".join(f"{w}x{h}: {n}" for (w, h), n in sorted(report.sizes.items(), key=lambda x: -x[1])[:5])
        more = f" and {len(report.sizes) - 5} more sizes" if len(report.sizes) > 5 else ""
        sys.stdout.write(f"{name}: {report.images} images, {len(report.classes)} classes, {sizes}{more}\n")
        for problem in report.problems:
            sys.stdout.write(f"  index {problem.index}: {problem.message}\n")
        broken += len(report.problems)
    if broken:
        raise CorruptSample(f"{path}: {broken} images cannot be used")


def _note(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _settings(config: str, overrides: list[str] | None, stages: tuple[Stage, ...]) -> Config:
    """The configuration, checked for `stages`. `hpc-supcon run data.views=3` is the quickstart with an override."""
    if "=" in config:
        return load_config(QUICKSTART, [config, *(overrides or [])], stages=stages)
    return load_config(config, overrides or [], stages=stages)


def _print_results(folder: Path, results: list[dict[str, Any]]) -> None:
    """A row for each probe and split."""
    table = Table(title=_title(results))
    names = ("accuracy", "f1", "precision", "recall")
    for heading in ("probe", "split", *names):
        table.add_column(heading, justify="right" if heading in names else "left")
    for result in results:
        for split in ("validation", "test"):
            if result[split] is not None:
                numbers = (f"{result[split][name]:.4f}" for name in names)
                table.add_row(result["probe"], split, *numbers, end_section=split == "test")
    console = Console()
    console.print(table)
    console.print(f"results: {folder / 'results.json'}", soft_wrap=True, highlight=False)


def _title(results: list[dict[str, Any]]) -> str:
    """The encoder that was probed, or the data where all probes read pixels."""
    for result in results:
        if result["encoder"] is not None:
            return f"{result['encoder']}, {result['loss']} ({result['checkpoint']})"
    return f"{results[0]['data']}, pixels"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; named errors become one line and their exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files need not be valid text
    try:
        app(arguments, prog_name="hpc-supcon")
    except HpcSupconError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        elif _is_first_on_node() or error.of_this_rank:
            kind = "" if isinstance(error, Preempted) else "error: "
            sys.stderr.write(f"hpc-supcon: {kind}{error}\n")
        sys.exit(error.exit_code)


def _is_first_on_node() -> bool:
    """Wrong input gives the same error on all ranks of a node: one line per node, not one per rank."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) in ("", "0")


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"hpc-supcon {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is not None and context.invoked_subcommand not in OF_ALL_RANKS:
        check_one_process(context.invoked_subcommand)
