"""The grid folder: the frozen grid, the jobs that were submitted, and the outcome of each node.

grid.json          cells, nodes, profile, the code's commit        written by the submitter, under `lock`
grid.yaml          the grid file                                   the same
configs/NAME.yaml  the resolved configuration of each run folder   the same
submissions.jsonl  one line per job array: node -> job             the same
records/NODE.json  outcome, requeues, last error                   written by rank 0 of the node's job
runs/NAME/         run folders            logs/NODE.log   output of a node           jobs/   submitit's files
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import check_folder
from ..config.code import CODE
from ..environment import code_commit
from ..errors import RunFolderError
from ..files import private_folder, write_atomically
from .expand import Cell, GridPlan
from .schema import ClusterProfile, Resources, TableConfig

FORMAT = 1
JOBS = "jobs"
"""submitit's folder. It holds pickles that are executed when a job starts, so only its owner may write there."""


@dataclass(frozen=True)
class FrozenNode:
    """A node as it was submitted; see expand.Node."""

    name: str
    stage: str
    folder: str
    parent: str | None
    resources: Resources
    identity: str


@dataclass(frozen=True)
class FrozenGrid:
    """A grid folder's grid.json."""

    root: Path
    name: str
    cluster: str
    profile: ClusterProfile
    commit: str
    pack: int
    cells: tuple[Cell, ...]
    nodes: dict[str, FrozenNode]
    tables: tuple[TableConfig, ...]
    code: tuple[str, ...] = ()
    """Import paths in its configurations."""

    def run_folder(self, node: FrozenNode) -> Path:
        return self.root / "runs" / node.folder

    def config(self, node: FrozenNode) -> Path:
        return self.root / "configs" / f"{node.folder}.yaml"


@dataclass
class NodeRecord:
    """What became of a node; `outcome`: running | requeued | done | failed | cancelled | blocked."""

    outcome: str
    job: str = ""
    host: str = ""
    pid: int = 0
    started: float = 0.0
    ended: float = 0.0
    error: str = ""
    commit: str = ""
    requeues: list[dict[str, Any]] = field(default_factory=list)


def freeze(root: Path, plan: GridPlan, source: str, cluster: str, profile: ClusterProfile) -> FrozenGrid:
    """Write the grid to its folder. Raises RunFolderError if the folder has a grid that this one does not extend."""
    nodes = {
        n.name: FrozenNode(n.name, n.stage, n.folder, n.parent, n.resources, n.identity) for n in plan.nodes.values()
    }
    if (root / "grid.json").exists():
        for name, old in load(root).nodes.items():
            if name not in nodes or nodes[name].identity != old.identity:
                raise RunFolderError(
                    f"{root}: holds another grid ({name} is not in this one, or computes something else); "
                    "choose another folder with --dir"
                )
    frozen = FrozenGrid(
        root.resolve(),
        plan.name,
        cluster,
        profile,
        code_commit(),
        plan.pack,
        plan.cells,
        nodes,
        plan.tables,
        plan.code,
    )
    for part in ("configs", "records", "runs", "logs"):
        (root / part).mkdir(parents=True, exist_ok=True)
    private_folder(root / JOBS)
    for node in plan.nodes.values():
        path = root / "configs" / f"{node.folder}.yaml"
        if not path.exists():
            write_atomically(  # not flushed: the next submission writes it again if it is missing
                path,
                node.resolved.yaml(name=node.folder, run_dir=str(frozen.root / "runs" / node.folder)),
                durable=False,
            )
    write_atomically(root / "grid.yaml", source)
    write_atomically(root / "grid.json", json.dumps(_to_json(frozen), indent=1))
    return frozen


def load(root: Path) -> FrozenGrid:
    """Read grid.json. Raises RunFolderError if the folder has none, CodeNotAllowed if it names code that is not
    allowed."""
    check_folder(root)
    try:
        data = json.loads((root / "grid.json").read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}")
        resources = [Resources(**kind) for kind in data["resources"]]
        nodes = {
            name: FrozenNode(name, n["stage"], n["folder"], n["parent"], resources[n["resources"]], n["identity"])
            for name, n in data["nodes"].items()
        }
        cells = tuple(Cell(c["name"], c["labels"], c["seed"], tuple(c["nodes"])) for c in data["cells"])
        return FrozenGrid(
            root.resolve(),
            data["name"],
            data["cluster"],
            ClusterProfile.model_validate_json(json.dumps(data["profile"])),
            data["commit"],
            data["pack"],
            cells,
            nodes,
            tuple(TableConfig.model_validate_json(json.dumps(table)) for table in data["tables"]),
            tuple(str(name) for name in data.get(CODE, ())),
        )
    except FileNotFoundError:
        raise RunFolderError(f"{root}: no grid.json in it, so this is not a grid folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{root / 'grid.json'}: cannot be read: {error}") from None


def _to_json(frozen: FrozenGrid) -> dict[str, Any]:
    kinds = list(dict.fromkeys(node.resources for node in frozen.nodes.values()))
    index = {kind: i for i, kind in enumerate(kinds)}
    nodes = {
        n.name: {
            "stage": n.stage,
            "folder": n.folder,
            "parent": n.parent,
            "resources": index[n.resources],
            "identity": n.identity,
        }
        for n in frozen.nodes.values()
    }
    return {
        "format": FORMAT,
        "name": frozen.name,
        "version": __version__,
        "cluster": frozen.cluster,
        "profile": frozen.profile.model_dump(mode="json"),
        "commit": frozen.commit,
        CODE: frozen.code,
        "pack": frozen.pack,
        "tables": [table.model_dump() for table in frozen.tables],
        "resources": [kind.model_dump() for kind in kinds],
        "cells": [asdict(cell) for cell in frozen.cells],
        "nodes": nodes,
    }


def prepare_run_folders(frozen: FrozenGrid, nodes: Iterable[FrozenNode]) -> None:
    """Make the run folders of nodes that read another folder's checkpoints: a link to them, and their own config."""
    for node in nodes:
        parent = frozen.nodes[node.parent] if node.parent else None
        if parent is None or parent.folder == node.folder:
            continue
        folder = frozen.run_folder(node)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", frozen.config(node).read_text(encoding="utf-8"))
        link = folder / "checkpoints"
        if not link.is_symlink():
            link.symlink_to(Path("..") / parent.folder / "checkpoints")


@contextmanager
def lock(root: Path, wait_s: float = 60.0) -> Iterator[None]:
    """Only one process at a time submits or runs a grid. Raises RunFolderError that names the other process.

    A POSIX lock: the kernel releases it when the process ends, also on NFS.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("a+", encoding="utf-8") as file:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise RunFolderError(f"{root / 'lock'}: cannot be locked: {error.strerror}") from None
                if time.monotonic() > until:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    raise RunFolderError(f"{root}: {holder} is submitting or running this grid") from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"{socket.gethostname()} process {os.getpid()}")
        file.flush()
        yield
        file.truncate(0)


def local_job_id(pid: int | str) -> str:
    """The id of a job without Slurm: host:pid."""
    return f"{socket.gethostname()}:{pid}"


def local_queue_id() -> str:
    """The id of a job that waits in this process for free resources or for its parent: queue:host:pid."""
    return f"queue:{local_job_id(os.getpid())}"


def append_submission(root: Path, stage: str, jobs: dict[str, str]) -> None:
    """Record the job ids of nodes."""
    line = json.dumps({"time": round(time.time(), 1), "stage": stage, "jobs": jobs})
    with (root / "submissions.jsonl").open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")  # the line before may have been torn by a kill
        file.flush()
        os.fsync(file.fileno())


def submitted_jobs(root: Path) -> dict[str, str]:
    """Node -> id of its last job; {} before the first submission."""
    jobs: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (root / "submissions.jsonl").read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):  # an empty line, or one that was torn by a kill
                jobs |= json.loads(line)["jobs"]
    return jobs


def read_record(root: Path, node: str) -> NodeRecord | None:
    try:
        return NodeRecord(**json.loads((root / "records" / f"{node}.json").read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise RunFolderError(f"{root / 'records' / node}.json: cannot be read: {error}") from None


def read_records(root: Path) -> dict[str, NodeRecord]:
    names = (entry.name[:-5] for entry in os.scandir(root / "records") if entry.name.endswith(".json"))
    found = ((name, read_record(root, name)) for name in names)
    return {name: record for name, record in found if record is not None}


def write_record(root: Path, node: str, record: NodeRecord) -> None:
    write_atomically(root / "records" / f"{node}.json", json.dumps(asdict(record)))
