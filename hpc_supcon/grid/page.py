"""The page of a grid: its tables with their seeds, charts, curves of all runs, and what failed and why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import LaunchError, RunFolderError, printable
from ..pages.compare import compare
from ..pages.curves import cost_of
from ..pages.formats import duration
from ..pages.headlines import headlines_of_groups
from ..pages.page import Page, Section, render, write_page
from ..pages.read import Run, number, read_run
from ..pages.runs import PAGE, data_of, facts_of, record_sections, result_sections
from ..pages.scores import name_of
from ..pages.tables import Cell, Table, text_cell
from .charts import DASHES, has_lines, series_of
from .folder import FrozenGrid, read_records
from .node_state import FAILED, NodeState, node_states
from .report import heading_of, note_of, shown
from .status import ORDER, log_of
from .tables import TableData, build_tables, is_numeric, key_of

MAX_DETAILS = 24
"""Runs of which a page has maps, confusions and classes; of more, scores and curves only."""


def write_grid_page(frozen: FrozenGrid) -> Path:
    """Write GRID_DIR/report.html; returns its path. Raises ConfigError and OutputError."""
    path = frozen.root / PAGE
    write_page(path, render(page_of_grid(frozen)))
    return path


def page_of_grid(frozen: FrozenGrid) -> Page:
    """What is known of a grid by now. Raises ConfigError for tables of axes that it does not have."""
    runs, notices = _runs(frozen)
    states = _states(frozen, notices)
    tables = _tables(frozen, notices)
    comparison, facts = compare(runs) if runs else None, [facts_of(run) for run in runs]
    data: dict[str, Any] = data_of(runs)
    data["charts"], shown_tables = [], []
    for table in tables:
        charts = _charts(table)
        shown_tables.append(_table(table, [len(data["charts"]) + i for i in range(len(charts))]))
        data["charts"] += charts
    failed = _failed(frozen, states)
    sections = [
        Section("tables", "Tables", shown_tables, note=f"{note_of(frozen, tables)} Code: {frozen.commit}."),
        Section("failed", "What failed", [failed] if failed.rows else []),
        *(result_sections(runs, comparison, data) if comparison else []),
        *record_sections(runs, facts),
    ]
    if len(runs) > MAX_DETAILS:
        sections = [section for section in sections if section.id not in ("confusion", "comparison")]
    notices += [*(comparison.notices if comparison else []), *(notice for run in runs for notice in run.notices)]
    counts = Counter(state.state for state in states.values())
    return Page(
        title=frozen.name,
        kind="Grid",
        summary=f"{len(frozen.cells)} cells, {len({cell.seed for cell in frozen.cells})} seeds",
        headlines=headlines_of_groups(comparison) if comparison else [],
        facts=[*((state, str(counts[state])) for state in ORDER if counts[state]), *_cost(runs)],
        sections=[s for s in sections if s.tables or s.widget or s.picture],
        notices=list(dict.fromkeys(notices)),
        data=data,
        has_map=any(run["maps"] for run in data["runs"]),
    )


def _runs(frozen: FrozenGrid) -> tuple[list[Run], list[str]]:
    """The run folders that exist, labeled by the name of their folder, and what is wrong with others."""
    runs, notices = [], []
    for name in dict.fromkeys(node.folder for node in frozen.nodes.values()):
        folder = frozen.root / "runs" / name
        if not folder.is_dir():
            continue
        try:
            run = read_run(folder)
        except RunFolderError as error:
            notices.append(str(error))
            continue
        run.label = printable(name)
        runs.append(run)
    return runs, notices


def _states(frozen: FrozenGrid, notices: list[str]) -> dict[str, NodeState]:
    """As `grid status`; where the scheduler does not answer, as the jobs recorded them."""
    try:
        return node_states(frozen)
    except LaunchError as error:
        notices.append(f"states are those that the jobs recorded: {error}")
        records = read_records(frozen.root)
        return {
            n: NodeState(r.outcome, r.error) if (r := records.get(n)) else NodeState("missing") for n in frozen.nodes
        }


def _tables(frozen: FrozenGrid, notices: list[str]) -> list[TableData]:
    try:
        return build_tables(frozen)
    except RunFolderError as error:
        notices.append(str(error))
        return []


def _table(table: TableData, charts: list[int]) -> Table:
    headings = [heading_of(table, column, score) for column in table.columns for score in table.scores]
    result = Table(table.title, [table.rows_axis, *headings], charts=charts)
    numeric = is_numeric(table)
    for row in table.rows:
        cells = [Cell(row, float(row)) if numeric else text_cell(row)]
        for column in table.columns:
            for score in table.scores:
                found = table.interval(row, column, score)
                cells.append(Cell(shown(table, row, column, score), found[0] if found else None))
        result.rows.append(cells)
    return result


def _charts(table: TableData) -> list[dict[str, Any]]:
    """Each score of `table.charts` that has any value, by row, column and split, for the page's script."""
    charts = []
    for score in table.charts:
        columns: list[dict[str, Any]] = []
        for column, split in series_of(table, score):
            found = [table.interval(row, column, key_of(score, split)) for row in table.rows]
            names = [column] * (column != "") + [split] * (len(table.splits) > 1)
            columns.append(
                {
                    "label": printable(", ".join(names) or score),
                    "color": table.columns.index(column),
                    "dash": DASHES[split],
                    "mean": [one[0] if one else None for one in found],
                    "half": [one[1] if one else 0.0 for one in found],
                }
            )
        if any(mean is not None for column in columns for mean in column["mean"]):
            split = f"{table.splits[0]} " if len(table.splits) == 1 else ""
            charts.append(
                {
                    "title": printable(table.title),
                    "axis": printable(table.rows_axis),
                    "score": f"{split}{name_of(score)}",
                    "rows": [printable(row) for row in table.rows],
                    "numeric": has_lines(table),
                    "colors": len(table.columns),
                    "columns": columns,
                }
            )
    return charts


def _failed(frozen: FrozenGrid, states: dict[str, NodeState]) -> Table:
    table = Table("Runs that failed", ["node", "state", "why", "log"])
    for name, state in states.items():
        if state.state in (*FAILED, "cancelled"):
            row = (name, state.state, state.detail, "" if state.state == "blocked" else log_of(frozen, name))
            table.rows.append([text_cell(cell) for cell in row])
    return table


def _cost(runs: list[Run]) -> list[tuple[str, str]]:
    """Time of training, on all ranks of all runs, by device."""
    seconds: dict[str, float] = {}
    for run in runs:
        if not (run.folder / "checkpoints").is_symlink():  # those belong to the run that was trained
            device = str(run.start.get("device") or "rank")
            kind = "CPU" if device == "cpu" else "rank" if device == "rank" else "GPU"
            ranks = number(run.start.get("world_size")) or 1.0
            seconds[kind] = seconds.get(kind, 0.0) + cost_of(run).get("seconds", 0.0) * ranks
    unit = {"CPU": "time of CPU ranks", "GPU": "GPU time", "rank": "time of ranks"}
    return [
        (unit[kind], f"{total / 3600:.2f} h" if total >= 3600 else duration(total))
        for kind, total in seconds.items()
        if total
    ]
