"""From results.json files to the numbers of tables: grouped by axes, with mean and interval over seeds."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RunFolderError, unknown_name
from ..report.statistics import mean_and_interval
from ..run_folder import read_scores
from .expand import Cell
from .folder import FrozenGrid
from .schema import TableConfig

SCORES = ("f1", "accuracy", "precision", "recall")
SIZES = ("sparse_mb", "ratio", "accuracy", "f1", "knn", "silhouette")
WHERE_KNOWN = ("knn", "silhouette")
"""Of these, a table has a column only where any of its results has them."""
LAYOUTS = {"scores": SCORES, "matrix": ("accuracy",), "curve": ("accuracy",), "pruning": SIZES}
UNPRUNED = "0"


@dataclass(frozen=True)
class CellResult:
    """One evaluated model of a cell: its label on each axis, and its numbers by name."""

    labels: dict[str, str]
    probe: str
    numbers: dict[str, float]


@dataclass
class TableData:
    """A table: `values[row, column, score]` of the seeds, of which there are `expected` when all are done."""

    title: str
    layout: str
    rows_axis: str
    rows: list[str]
    columns: list[str]
    scores: tuple[str, ...]
    values: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    expected: dict[tuple[str, str], int] = field(default_factory=dict)

    def interval(self, row: str, column: str, score: str) -> tuple[float, float] | None:
        """(mean, half width of the 95 % interval, which is 0 for one value), or None without values."""
        return mean_and_interval(self.values.get((row, column, score), []))


def results_of(frozen: FrozenGrid, cell: Cell) -> list[CellResult]:
    """The results in the cell's run folder, [] while there are none. Raises RunFolderError for a damaged file."""
    node = frozen.nodes[cell.nodes[-1]]
    path = frozen.run_folder(node) / "results.json"
    try:
        entries = json.loads(path.read_bytes())["results"]
        entries = [entry for entry in entries if entry["stage"] == node.stage and entry.get("test")]
        features = {} if node.stage == "prune" else _features(path.parent, entries)
        return [_result(cell, entry, features) for entry in entries]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path}: cannot be read: {type(error).__name__} {error}") from None


def _features(folder: Path, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """As the entries of pruned encoders have them in `features`."""
    knn = next((entry["test"]["accuracy"] for entry in entries if entry.get("probe") == "knn"), None)
    encoder = read_scores(folder).get("embedding", {}).get("encoder", {})
    return {"knn": knn, "silhouette": encoder.get("silhouette")}


def _result(cell: Cell, entry: dict[str, Any], features: dict[str, Any]) -> CellResult:
    labels, numbers = dict(cell.labels), {score: float(entry["test"][score]) for score in SCORES}
    features = entry.get("features", features)
    numbers |= {score: float(features[score]) for score in WHERE_KNOWN if features.get(score) is not None}
    if "prune" in entry:
        size = entry["size"]
        labels["prune.rate"] = f"{entry['prune']['rate']:g}"
        numbers["sparse_mb"] = size["sparse_bytes"] / 1e6
        numbers["ratio"] = size["dense_bytes"] / size["sparse_bytes"]
        numbers["dense_mb"] = size["dense_bytes"] / 1e6
    return CellResult(labels, str(entry.get("probe", "")), numbers)


def build_tables(frozen: FrozenGrid) -> list[TableData]:
    """Every table of the grid. For an axis that a table does not name, there is one table for each of its values.

    Raises ConfigError for an axis that the grid does not have, RunFolderError for damaged results.
    """
    results = {cell.name: results_of(frozen, cell) for cell in frozen.cells}
    return [table for config in frozen.tables for table in _build(frozen.cells, results, config)]


def _build(cells: Sequence[Cell], results: dict[str, list[CellResult]], config: TableConfig) -> list[TableData]:
    axes = list(dict.fromkeys(axis for cell in cells for axis in cell.labels))
    named = [config.rows, *([config.columns] if config.columns else [])]
    for axis in named:
        if axis not in axes:
            raise ConfigError(f"table {config.title!r}: {unknown_name('axis', axis, axes)}")
    labels = {axis: list(dict.fromkeys(c.labels[axis] for c in cells if axis in c.labels)) for axis in axes}
    others = [axis for axis in axes if axis not in (*named, "seed", "prune.rate") and len(labels[axis]) > 1]
    if config.layout != "pruning" and "prune.rate" in axes and "prune.rate" not in named:
        others.append("prune.rate")
    tables = []
    for combination in itertools.product(*(labels[axis] for axis in others)):
        wanted = dict(zip(others, combination, strict=True))
        chosen = [cell for cell in cells if all(cell.labels.get(axis) == v for axis, v in wanted.items())]
        if chosen:
            title = ", ".join([config.title, *(f"{axis} {_row(wanted, axis)}" for axis in wanted)])
            tables.append(_fill(title, config, chosen, results))
    return tables


def _fill(title: str, config: TableConfig, cells: list[Cell], results: dict[str, list[CellResult]]) -> TableData:
    table = TableData(title, config.layout, config.rows, [], [], LAYOUTS[config.layout])
    for cell in cells:
        column = cell.labels.get(config.columns, "") if config.columns else ""
        if column not in table.columns:
            table.columns.append(column)
        found = _of_kind(results[cell.name], config.probe)
        if not found:
            _add(table, _row(cell.labels, config.rows), column, None)
        for result in found:
            _add(table, _row(result.labels, config.rows), column, result)
    known = {score for _, _, score in table.values}
    table.scores = tuple(score for score in table.scores if score not in WHERE_KNOWN or score in known)
    if config.layout == "pruning":
        _size_of_unpruned(table, cells, results)
    if _all_numbers(table.rows):
        table.rows.sort(key=float)
    return table


def _size_of_unpruned(table: TableData, cells: list[Cell], results: dict[str, list[CellResult]]) -> None:
    """The size of a model that was not pruned: the dense size in the results of the pruned ones."""
    dense = [r.numbers["dense_mb"] for cell in cells for r in results[cell.name] if "dense_mb" in r.numbers]
    for column in table.columns:
        for score, value in (("sparse_mb", dense[:1]), ("ratio", [1.0])):
            if dense and (UNPRUNED, column, "accuracy") in table.values:
                table.values.setdefault((UNPRUNED, column, score), value * table.expected[UNPRUNED, column])


def _row(labels: dict[str, str], axis: str) -> str:
    label = labels.get(axis, "")
    return UNPRUNED if axis == "prune.rate" and label == "null" else label


def _add(table: TableData, row: str, column: str, result: CellResult | None) -> None:
    """Count a cell as expected, and add its numbers if it has results."""
    if row not in table.rows:
        table.rows.append(row)
    table.expected[row, column] = table.expected.get((row, column), 0) + 1
    if result is not None:
        for score in table.scores:
            if score in result.numbers:
                table.values.setdefault((row, column, score), []).append(result.numbers[score])


def _of_kind(results: list[CellResult], probe: str | None) -> list[CellResult]:
    """Results of one kind of probe: the given one, else that of the first result."""
    kind = probe or next((result.probe for result in results), "")
    return [result for result in results if result.probe == kind]


def _all_numbers(labels: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(label)) for label in labels)
    except ValueError:
        return False


def is_numeric(table: TableData) -> bool:
    """Whether the rows are numbers, so that a line can connect them."""
    return _all_numbers(table.rows)
