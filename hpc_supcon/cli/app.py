"""The root of the command line, and the commands `run | pretrain | probe | config`."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from typer.main import get_command

from .. import __version__
from ..config import Config, Stage, load_config, schema_rows, to_yaml
from ..distributed.resolve import check_one_process
from ..environment import known_commit
from ..errors import HpcSupconError, Preempted
from ..old_names import printed
from ..stages.probe_settings import settings_of_probe
from ..stages.start import refused_together, started
from ..terminal import output, warn
from .bench import bench
from .checkpoints import checkpoints
from .common import Debug, Overrides
from .data import convert, verify
from .doctor import doctor
from .embeddings import embeddings
from .export import embed, export, predict
from .grid import grid
from .guard import guarded
from .init import init
from .prune import prune
from .push import push
from .report import compare, report, write_own_page
from .results import print_results
from .streams import safe_streams
from .track import track

QUICKSTART = "quickstart"
RUN: tuple[Stage, ...] = ("pretrain", "probe")
"""The stages of `hpc-supcon run`."""

OF_ALL_RANKS = ("run", "pretrain", "probe", "prune", "embeddings")
"""The commands that several processes do together; all others are the work of one."""

app = typer.Typer(
    name="hpc-supcon",
    help="Supervised contrastive learning of images, from one CPU to a Slurm cluster.",
    epilog="Several ranks: torchrun --nproc_per_node N -m hpc_supcon run CONFIG, or srun hpc-supcon run CONFIG. "
    "Exit codes: 0 done; 1 results could not be written, and were printed; 2 wrong input; 3 NaN or Inf; 4 the "
    "loader died; 5 another rank was lost or hangs; 6 out of memory; 75 preempted (SIGTERM, SIGUSR2) and saved: "
    "start again with --resume.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(bench, name="bench")
app.command("convert")(convert)
app.command("verify")(verify)
app.command("checkpoints")(checkpoints)
app.command("prune")(prune)
app.command("embeddings")(embeddings)
app.command("export")(export)
app.command("embed")(embed)
app.command("predict")(predict)
app.command("push")(push)
app.add_typer(grid, name="grid")
app.command("report")(report)
app.command("compare")(compare)
app.command("track")(track)
app.command("doctor")(doctor)
app.command("init")(init)

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A recipe's name or a YAML file.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume from the run folder's newest checkpoint.")]


@app.command()
def run(
    config: ConfigArgument = QUICKSTART, overrides: Overrides = None, resume: Resume = False, debug: Debug = False
) -> None:
    """Pre-train an encoder, evaluate it, and draw its embeddings (pretrain + probe + embeddings).

    Where all probes read pixels, none is trained.
    """
    with refused_together():
        settings = _settings(config, overrides, RUN)
    command = {"command": "run", "--resume": "yes" if resume else "no"}
    with started(settings, RUN, command, resume=resume) as (runtime, data):
        from ..distributed.collectives import propagate_errors
        from ..evaluation.probes import check_probes
        from ..stages.pretrain_run import pretrain_and_draw
        from ..stages.probe import probe, start_without_encoder
        from ..stages.results import ResultWriter

        with propagate_errors():
            check_probes(settings, data.splits)
        writer = ResultWriter()
        if settings.probe.needs_encoder:
            folder = pretrain_and_draw(settings, runtime, data, resume=resume, writer=writer)
        else:
            folder = start_without_encoder(settings, runtime)
        results = probe(folder, settings, runtime, data, writer=writer)
        if runtime.is_main and results:
            print_results(folder, results)
        if settings.report.embeddings:
            from ..stages.embeddings import draw_embeddings

            draw_embeddings(folder, settings, runtime, data, writer=writer, required=False)
        if runtime.is_main and settings.report.html:
            write_own_page(folder)
        writer.check()


@app.command("pretrain")
def pretrain_command(
    config: ConfigArgument = QUICKSTART, overrides: Overrides = None, resume: Resume = False, debug: Debug = False
) -> None:
    """Pre-train an encoder into a run folder."""
    with refused_together():
        settings = _settings(config, overrides, ("pretrain",))
    command = {"command": "pretrain", "--resume": "yes" if resume else "no"}
    with started(settings, ("pretrain",), command, resume=resume) as (runtime, data):
        from ..stages.pretrain_run import pretrain_and_draw
        from ..stages.results import ResultWriter

        writer = ResultWriter()
        pretrain_and_draw(settings, runtime, data, resume=resume, writer=writer)
        writer.check()


@app.command("probe")
def probe_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")],
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Evaluate a run folder's encoder, or the pixels, by the probes of probe.kind; also on other data: data.source,
    probe.transfer. Writes results.json there."""
    with refused_together():
        settings, of_run = settings_of_probe(run_dir, overrides or [])
    command = {"command": "probe", "RUN_DIR": run_dir.absolute()}
    with started(settings, ("probe",), command, resume=True, folder=run_dir, of_run=of_run) as (runtime, data):
        from ..distributed.collectives import propagate_errors
        from ..evaluation.probes import check_probes
        from ..stages.probe import probe
        from ..stages.results import ResultWriter

        with propagate_errors():
            check_probes(settings, data.splits)
        writer = ResultWriter()
        results = probe(run_dir, settings, runtime, data, writer=writer, is_other=of_run is not None)
        if runtime.is_main:
            print_results(run_dir, results)
        writer.check()


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
        table.add_row(*row)
    output().print(table)


def _settings(config: str, overrides: list[str] | None, stages: tuple[Stage, ...]) -> Config:
    """The configuration, checked for `stages`. `hpc-supcon run data.views=3` is the quickstart with an override."""
    if "=" in config:
        return load_config(QUICKSTART, [config, *(overrides or [])], stages=stages)
    return load_config(config, overrides or [], stages=stages)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; named errors become one line and their exit code.

    Where stdout does not take what a command prints, one line says so on stderr, and the exit code is not 0.
    """
    with safe_streams() as stdout, printed(warn):
        try:
            _main(sys.argv[1:] if arguments is None else arguments)
        except SystemExit as exit:
            stdout.flush()
            if stdout.error is not None:
                sys.stderr.write(f"hpc-supcon: error: stdout: {stdout.error.strerror}; what was printed is lost\n")
                raise SystemExit(exit.code or 1) from None
            raise


def _main(arguments: list[str]) -> None:
    try:
        guarded(get_command(app))(arguments, prog_name="hpc-supcon")
    except HpcSupconError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        elif not error.is_printed and (_is_first_on_node() or error.of_this_rank):
            kind = "" if isinstance(error, Preempted) else "error: "
            sys.stderr.write(f"hpc-supcon: {kind}{error}\n")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None or "--debug" in arguments:
            raise
        sys.stderr.write(f"hpc-supcon: error: {error.filename}: {error.strerror}\n")
        sys.exit(2 if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else 1)


def _is_first_on_node() -> bool:
    """Wrong input gives the same error on all ranks of a node: one line per node, not one per rank."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) in ("", "0")


def _version(value: bool) -> None:
    if value:
        commit = known_commit()
        sys.stdout.write(f"hpc-supcon {__version__}{f' ({commit})' if commit else ''}\n")
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
