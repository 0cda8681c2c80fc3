"""The output of `grid status`, `grid expand` and `grid logs`."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError, RunFolderError, unknown_name
from .expand import GridPlan
from .folder import JOBS, FrozenGrid, submitted_jobs
from .node_state import FAILED, NodeState, progress
from .schema import STAGES

ORDER = ("done", "running", "pending", "failed", "blocked", "cancelled", "lost", "missing")
STYLES = {"done": "green", "running": "cyan", "failed": "red", "lost": "red", "blocked": "yellow"}
# shown first: what runs, then what needs attention
SHOWN_FIRST = ("running", "failed", "lost", "blocked", "cancelled", "pending", "missing", "done")


def render(frozen: FrozenGrid, states: dict[str, NodeState], rows: int | None) -> RenderableType:
    """Counts for each stage, and at most `rows` nodes (None: all), those that run or failed first."""
    parts: list[RenderableType] = [
        Text(f"{frozen.name}: {len(frozen.cells)} cells in {frozen.root}"),
        _counts(frozen, states),
    ]
    chosen = sorted(frozen.nodes, key=lambda name: SHOWN_FIRST.index(states[name].state))
    if rows is not None:
        chosen = [name for name in chosen if states[name].state != "done"]
        hidden, chosen = len(chosen[rows:]), chosen[:rows]
    else:
        hidden = 0
    if chosen:
        parts.append(_rows(frozen, states, chosen))
    if hidden:
        parts.append(Text(f"... and {hidden} more (--all)"))
    return Group(*parts)


def _counts(frozen: FrozenGrid, states: dict[str, NodeState]) -> Table:
    counted = Counter((node.stage, states[name].state) for name, node in frozen.nodes.items())
    seen = [state for state in ORDER if any(s == state for _, s in counted)]
    table = Table("stage", *seen, box=None, pad_edge=False, header_style="bold")
    for stage in STAGES:
        if any(s == stage for s, _ in counted):
            table.add_row(stage, *(str(counted[stage, state]) for state in seen))
    return table


def _rows(frozen: FrozenGrid, states: dict[str, NodeState], chosen: Iterable[str]) -> Table:
    table = Table("node", "state", "step", "images/s", "time left", "requeued", "detail", box=None, pad_edge=False)
    for name in chosen:
        state, node = states[name], frozen.nodes[name]
        event = progress(frozen, node) if state.state == "running" and node.stage == "pretrain" else {}
        detail = state.detail
        if state.state in FAILED and state.state != "blocked":
            detail = f"{detail} ({log_of(frozen, name)})"
        table.add_row(
            name,
            Text(state.state, style=STYLES.get(state.state, "")),
            str(event.get("step", "")),
            f"{event['images_per_s']:,.0f}" if "images_per_s" in event else "",
            _duration(event["time_left_s"]) if "time_left_s" in event else "",
            f"{state.requeues} times" if state.requeues else "",
            Text(detail, overflow="fold"),
        )
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def log_of(frozen: FrozenGrid, name: str) -> str:
    """The path of a node's log."""
    return str(frozen.root / "logs" / f"{name}.log")


def logs_of(frozen: FrozenGrid, name: str) -> list[Path]:
    """The logs of a node's ranks and of submitit for its job. Raises RunFolderError if there is none."""
    job = submitted_jobs(frozen.root).get(name, "none").rpartition(":")[2]  # without the host: submitit's own id
    found = [
        *(frozen.root / JOBS).glob(f"{glob.escape(job)}_*_log.*"),
        *(frozen.root / "logs").glob(f"{name}.*log"),
    ]
    found = [path for path in found if path.stat().st_size]
    if not found:
        raise RunFolderError(f"{frozen.root}: {name} has no log yet")
    return sorted(found)


def find_nodes(frozen: FrozenGrid, cell: str) -> list[str]:
    """The nodes of a cell, or the one node, of that name. Raises ConfigError."""
    if cell in frozen.nodes:
        return [cell]
    found = [node for c in frozen.cells if c.name == cell for node in c.nodes]
    found = found or [name for name, node in frozen.nodes.items() if node.folder == cell]
    if not found:
        raise ConfigError(unknown_name("cell", cell, {*(c.name for c in frozen.cells), *frozen.nodes}))
    return found


def render_plan(plan: GridPlan, rows: int | None) -> RenderableType:
    """The nodes in the order in which they can run, and what they cost at most."""
    table = Table("node", "after", "ranks", "GPUs", "minutes", box=None, pad_edge=False, header_style="bold")
    nodes = list(plan.nodes.values())
    for node in nodes[:rows]:
        requested = node.resources
        ranks, gpus = requested.nodes * requested.tasks_per_node, requested.nodes * requested.gpus
        table.add_row(node.name, node.parent or "", str(ranks), str(gpus), str(requested.minutes))
    counts = Counter(node.stage for node in nodes)
    stages = ", ".join(f"{counts[stage]} {stage}" for stage in STAGES if counts[stage])
    gpu, cpu, longest = plan.hours
    parts: list[RenderableType] = [table]
    if rows is not None and len(nodes) > rows:
        parts.append(Text(f"... and {len(nodes) - rows} more (--all)"))
    parts.append(Text(f"{plan.name}: {len(plan.cells)} cells, {stages}"))
    parts.append(
        Text(f"at most {gpu:,.1f} GPU-hours, {cpu:,.1f} CPU-core-hours; the longest path takes {longest:,.1f} hours")
    )
    return Group(*parts)
