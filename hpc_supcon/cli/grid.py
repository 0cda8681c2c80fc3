"""The command line of grids: `hpc-supcon grid expand | submit | status | cancel | retry | logs | report`."""

from __future__ import annotations

import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live

from ..errors import ConfigError, unknown_name
from ..terminal import output
from .common import Debug

if TYPE_CHECKING:
    from ..grid.expand import GridPlan
    from ..grid.schema import ClusterProfile

grid = typer.Typer(
    help="Many runs from one YAML: submit them, watch them, tabulate their results.", no_args_is_help=True
)

CLUSTERS = ("slurm", "local", "debug")
ROWS = 40
GridFile = Annotated[Path, typer.Argument(metavar="GRID", help="A grid file, such as launch/grids/deck.yaml.")]
GridDir = Annotated[Path, typer.Argument(metavar="GRID_DIR", help="A grid's folder.")]
CellOverrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="Settings of every cell, such as data.root=/data.")
]
All = Annotated[bool, typer.Option("--all", help="Show every row.")]


def _plan(path: Path, overrides: list[str] | None) -> GridPlan:
    from ..grid.cells import load
    from ..grid.expand import expand

    return expand(load(path), overrides or [])


def _profile(path: Path | None, cluster: str | None) -> tuple[str, ClusterProfile]:
    from ..grid.schema import ClusterProfile, read_profile

    if cluster is not None and cluster not in CLUSTERS:
        raise ConfigError(unknown_name("cluster", cluster, CLUSTERS))
    profile = read_profile(path) if path is not None else ClusterProfile(cluster=cluster or "slurm")  # type: ignore[arg-type]
    return cluster or profile.cluster, profile


@grid.command("expand")
def expand_command(
    grid_file: GridFile, overrides: CellOverrides = None, every: All = False, debug: Debug = False
) -> None:
    """Check every cell; show the runs, their order and what they cost at most. Submits nothing."""
    from ..grid.status import render_plan

    output().print(render_plan(_plan(grid_file, overrides), None if every else ROWS))


@grid.command("submit")
def submit_command(
    grid_file: GridFile,
    overrides: CellOverrides = None,
    cluster: Annotated[str | None, typer.Option(help="slurm | local | debug; by default the profile's.")] = None,
    profile: Annotated[Path | None, typer.Option(help="A cluster's profile: launch/clusters/NAME.yaml.")] = None,
    folder: Annotated[Path | None, typer.Option("--dir", help="The grid's folder; by default grids/NAME.")] = None,
    debug: Debug = False,
) -> None:
    """Submit the runs that are missing or failed, not those that are done or in the queue."""
    from ..grid.folder import freeze, lock
    from ..grid.node_state import UNFINISHED
    from ..grid.submit import check_profile, require_cluster, submit

    plan = _plan(grid_file, overrides)
    kind, settings = _profile(profile, cluster)
    require_cluster(kind)
    check_profile(plan.nodes.values(), settings, kind)
    root = folder or Path("grids") / plan.name
    with lock(root):
        frozen = freeze(root, plan, grid_file.read_text(encoding="utf-8"), kind, settings)
        count = submit(frozen, UNFINISHED, _report)
    done = "submitted" if kind == "slurm" else "run"
    _report(f"{count} of {len(plan.nodes)} nodes {done}; hpc-supcon grid status {root}")
    if kind != "slurm":
        _summary(root)


@grid.command("status")
def status_command(
    grid_dir: GridDir,
    watch: Annotated[
        bool, typer.Option("--watch", help="Refresh every few seconds until no run waits or runs.")
    ] = False,
    every: All = False,
    debug: Debug = False,
) -> None:
    """Show the state of every run, from the scheduler and the run folders."""
    from ..grid.folder import load
    from ..grid.node_state import QUEUED, node_states
    from ..grid.status import render

    frozen, rows, console = load(grid_dir), None if every else ROWS, output()
    if not watch:
        console.print(render(frozen, node_states(frozen), rows))
        return
    shown: dict[str, str] = {}
    # a log gets a table for each change, as Live would print the last one only
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while True:
            states = node_states(frozen)
            found = {name: state.state for name, state in states.items()}
            if live is not None:
                live.update(render(frozen, states, rows), refresh=True)
            elif found != shown:
                console.print(render(frozen, states, rows))
            shown = found
            if not any(state in QUEUED for state in found.values()):
                return
            time.sleep(5)


@grid.command("cancel")
def cancel_command(
    grid_dir: GridDir,
    cells: Annotated[list[str] | None, typer.Argument(metavar="CELL", help="Cells or nodes; by default all.")] = None,
    debug: Debug = False,
) -> None:
    """Cancel jobs that wait or run. A packed job is cancelled with all its cells."""
    from ..grid.folder import load, lock
    from ..grid.node_state import cancel
    from ..grid.status import find_nodes

    frozen = load(grid_dir)
    names = {node for cell in cells for node in find_nodes(frozen, cell)} if cells else set(frozen.nodes)
    if frozen.cluster == "slurm":
        with lock(grid_dir):
            cancelled = cancel(frozen, names)
    else:
        cancelled = cancel(frozen, names)
    _report(f"{len(cancelled)} nodes cancelled")


@grid.command("retry")
def retry_command(
    grid_dir: GridDir,
    failed: Annotated[
        bool, typer.Option("--failed", help="Runs that failed, and those that waited for them.")
    ] = False,
    cancelled: Annotated[bool, typer.Option("--cancelled", help="Runs that were cancelled.")] = False,
    debug: Debug = False,
) -> None:
    """Submit failed (or cancelled) runs again, with the same settings and profile."""
    from ..grid.folder import load, lock
    from ..grid.node_state import FAILED
    from ..grid.submit import require_cluster, submit

    if not failed and not cancelled:
        raise ConfigError("say what to submit again: --failed, --cancelled, or both")
    again = [*(FAILED if failed else ()), *(("cancelled",) if cancelled else ())]
    with lock(grid_dir):
        frozen = load(grid_dir)
        require_cluster(frozen.cluster)
        count = submit(frozen, again, _report)
    _report(f"{count} nodes {'submitted' if frozen.cluster == 'slurm' else 'run'} again")
    if frozen.cluster != "slurm":
        _summary(grid_dir)


@grid.command("logs")
def logs_command(
    grid_dir: GridDir,
    cell: Annotated[str, typer.Argument(metavar="CELL", help="A cell, or one of its nodes (CELL.pretrain).")],
    lines: Annotated[int, typer.Option(help="Last lines shown of each log; 0: all.")] = 50,
    debug: Debug = False,
) -> None:
    """Show the logs of a cell's jobs."""
    from ..grid.folder import load
    from ..grid.status import find_nodes, logs_of

    frozen = load(grid_dir)
    for name in find_nodes(frozen, cell):
        for path in logs_of(frozen, name):
            text = path.read_text(encoding="utf-8", errors="replace").splitlines()
            sys.stdout.write(f"==> {path} <==\n" + "".join(f"{line}\n" for line in text[-lines:]))


@grid.command("report")
def report_command(
    grid_dir: GridDir,
    out: Annotated[Path | None, typer.Option(help="Folder of the tables; by default GRID_DIR/report.")] = None,
    html: Annotated[bool, typer.Option("--html", help="Write one page instead: GRID_DIR/report.html.")] = False,
    debug: Debug = False,
) -> None:
    """Tables (Markdown, LaTeX, CSV) and charts (PNG) of the results so far; missing cells are shown as missing."""
    from ..grid.folder import load
    from ..grid.report import write_report

    if html:
        from ..grid.page import write_grid_page

        if out is not None:
            raise ConfigError("--html writes GRID_DIR/report.html; drop --out")
        sys.stdout.write(f"{write_grid_page(load(grid_dir))}\n")
        return
    sys.stdout.write(f"{write_report(load(grid_dir), out or grid_dir / 'report')}\n")


def _summary(root: Path) -> None:
    from ..grid.folder import load
    from ..grid.node_state import node_states

    counts = Counter(state.state for state in node_states(load(root)).values())
    _report(", ".join(f"{number} {state}" for state, number in counts.items()))


def _report(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
