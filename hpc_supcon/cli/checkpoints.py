"""The command `hpc-supcon checkpoints`: the checkpoints of a run folder, verified."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import CheckpointCorrupt, RunFolderError
from ..terminal import output
from .common import Debug


def checkpoints(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")],
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read every byte; otherwise only manifests and sizes.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of the table.")] = False,
    debug: Debug = False,
) -> None:
    """List a run's checkpoints, and verify them.

    Exit code: 0 when all are undamaged (or there is none yet), 1 when some are damaged, 2 when all are.
    """
    rows = describe(run_dir, verify=verify)
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        _print(run_dir, rows, verified=verify)
    damaged = [row["problem"] for row in rows if row["problem"]]
    if damaged and len(damaged) == len(rows):
        raise CheckpointCorrupt(f"{run_dir}: none of {len(rows)} checkpoints can be loaded")
    if damaged:
        raise typer.Exit(1)


def describe(run_dir: Path, *, verify: bool = True) -> list[dict[str, Any]]:
    """One entry for each checkpoint, oldest first: step, path, written (ISO 8601, local time), bytes (on disk),
    world_size (null: unknown), verified (null: not checked), problem (null: none).

    A checkpoint that a running job deletes meanwhile is left out. Raises RunFolderError.
    """
    from ..checkpoint.layout import MANIFEST, path_of
    from ..checkpoint.load import list_steps, problem_of, read_manifest
    from ..run_folder import CHECKPOINTS, CONFIG

    folder = run_dir / CHECKPOINTS
    if not (run_dir / CONFIG).is_file() and not folder.is_dir():
        raise RunFolderError(f"{run_dir}: neither {CONFIG} nor {CHECKPOINTS} in it, so this is not a run folder")
    rows: list[dict[str, Any]] = []
    for step in list_steps(folder):
        path, world_size = path_of(folder, step), None
        problem = problem_of(path, hashes=verify)
        try:
            sizes = [p.lstat().st_size for p in (path.iterdir() if path.is_dir() else [path])]
            written = (path / MANIFEST if (path / MANIFEST).exists() else path).lstat().st_mtime
            world_size = read_manifest(path)["world_size"]
        except FileNotFoundError:
            continue
        except CheckpointCorrupt:
            pass
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be read: {error.strerror}") from None
        rows.append(
            {
                "step": step,
                "path": str(path),
                "written": datetime.fromtimestamp(written).astimezone().isoformat(timespec="seconds"),
                "bytes": sum(sizes),
                "world_size": world_size,
                "verified": problem is None if verify or problem else None,
                "problem": problem,
            }
        )
    return rows


def _print(run_dir: Path, rows: list[dict[str, Any]], *, verified: bool) -> None:
    console = output()
    if not rows:
        console.print(f"{run_dir}: no checkpoint yet", soft_wrap=True)
        return
    table = Table(title=str(run_dir))
    for heading in ("step", "written", "bytes", "ranks", "state"):
        table.add_column(heading, justify="right" if heading in ("step", "bytes", "ranks") else "left")
    undamaged = "verified" if verified else "sizes match"
    for row in rows:
        ranks = "?" if row["world_size"] is None else str(row["world_size"])
        state = "damaged" if row["problem"] else undamaged
        table.add_row(str(row["step"]), row["written"].replace("T", " "), f"{row['bytes']:,}", ranks, state)
    console.print(table)
    for row in rows:
        if row["problem"]:
            console.print(f"step {row['step']}: {row['problem']}", soft_wrap=True)
