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
from ..pages.statistics import mean_and_interval
from ..run_folder import read_scores
from .expand import Cell
from .folder import FrozenGrid
from .schema import TableConfig

SCORES = ("f1", "accuracy", "precision", "recall")
ERRORS = ("mae", "mse")
"""Of an autoencoder's reconstructions."""
SIZES = ("sparse_mb", "ratio")
WHERE_KNOWN = ("knn", "silhouette")
"""Of pruned encoders; a table has a column only where any of its results has them."""
SPLITS = ("train", "validation", "test")
LAYOUTS = {"scores": SCORES, "matrix": ("accuracy",), "curve": ("accuracy",), "pruning": ("accuracy", "f1")}
UNPRUNED = "0"


def key_of(score: str, split: str) -> str:
    """By which a score of a split is found among the numbers of a result: `f1` of test, `validation f1`."""
    return score if split == "test" else f"{split} {score}"


def split_of(key: str) -> tuple[str, str]:
    """(score, split) of a key; the split of a size is ""."""
    split, _, score = key.rpartition(" ")
    return score, "" if score in SIZES else split or "test"


@dataclass(frozen=True)
class CellResult:
    """One evaluated model of a cell: its label on each axis, and its numbers by name."""

    labels: dict[str, str]
    probe: str
    numbers: dict[str, float]


@dataclass
class TableData:
    """A table: `values[row, column, score]` of the seeds, of which there are `expected` when all are done.

    scores: keys, see key_of. charts: the scores that are drawn, each with all `splits`.
    """

    title: str
    layout: str
    rows_axis: str
    rows: list[str]
    columns: list[str]
    scores: tuple[str, ...]
    values: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    expected: dict[tuple[str, str], int] = field(default_factory=dict)
    splits: tuple[str, ...] = ("test",)
    charts: tuple[str, ...] = ("accuracy",)

    def is_done(self, row: str, column: str) -> bool:
        """Whether there is any result: a score without a value is then one that its model does not have."""
        return any((row, column, score) in self.values for score in self.scores)

    def interval(self, row: str, column: str, score: str) -> tuple[float, float] | None:
        """(mean, half width of the 95 % interval, which is 0 for one value), or None without values."""
        return mean_and_interval(self.values.get((row, column, score), []))


def results_of(frozen: FrozenGrid, cell: Cell) -> list[CellResult]:
    """The results in the cell's run folder, [] while there are none. Raises RunFolderError for a damaged file."""
    nodes = [frozen.nodes[name] for name in cell.nodes]
    path = frozen.run_folder(nodes[-1]) / "results.json"
    try:
        entries = [entry for entry in _entries(path) if entry["stage"] == nodes[-1].stage and entry.get("test")]
        features = {} if nodes[-1].stage == "prune" else _features(path.parent, entries)
        found = [_result(cell, entry, features) for entry in entries]
        # the errors of an autoencoder are in the folder in which it was trained
        for path in dict.fromkeys(frozen.run_folder(node) / "results.json" for node in nodes):
            errors = [entry for entry in _entries(path) if entry["stage"] == "reconstruction"]
            for result in found if errors else []:
                result.numbers.update(_numbers(errors[-1], ERRORS))
        return found
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path}: cannot be read: {type(error).__name__} {error}") from None


def _entries(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_bytes())["results"]) if path.exists() else []


def _numbers(entry: dict[str, Any], scores: Sequence[str]) -> dict[str, float]:
    splits = [split for split in SPLITS if entry.get(split)]
    return {key_of(score, split): float(entry[split][score]) for split in splits for score in scores}


def _features(folder: Path, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """As the entries of pruned encoders have them in `features`."""
    knn = next((entry["test"]["accuracy"] for entry in entries if entry.get("probe") == "knn"), None)
    encoder = read_scores(folder).get("embedding", {}).get("encoder", {})
    return {"knn": knn, "silhouette": encoder.get("silhouette")}


def _result(cell: Cell, entry: dict[str, Any], features: dict[str, Any]) -> CellResult:
    labels, numbers = dict(cell.labels), _numbers(entry, SCORES)
    features = entry.get("features", features)
    numbers |= {score: float(features[score]) for score in WHERE_KNOWN if features.get(score) is not None}
    if "prune" in entry:
        size = entry["size"]
        # of before channels were removed; entries of before there was such a method have one dense size
        original = size.get("original_bytes", size["dense_bytes"])
        labels["prune.rate"] = f"{entry['prune']['rate']:g}"
        numbers["sparse_mb"] = size["sparse_bytes"] / 1e6
        numbers["ratio"] = original / size["sparse_bytes"]
        numbers["dense_mb"] = original / 1e6
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
    named = config.scores or LAYOUTS[config.layout]
    keys = [key_of(score, split) for score in named for split in config.splits if _is_measured(score, split)]
    sizes, features = (SIZES, WHERE_KNOWN) if config.layout == "pruning" else ((), ())
    table = TableData(title, config.layout, config.rows, [], [], (*sizes, *keys, *features))
    table.splits, table.charts = config.splits, config.scores or ("accuracy",)
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


def _is_measured(score: str, split: str) -> bool:
    return split != "train" or score not in ERRORS


def _size_of_unpruned(table: TableData, cells: list[Cell], results: dict[str, list[CellResult]]) -> None:
    """The size of a model that was not pruned: the dense size in the results of the pruned ones."""
    dense = [r.numbers["dense_mb"] for cell in cells for r in results[cell.name] if "dense_mb" in r.numbers]
    for column in table.columns:
        for score, value in (("sparse_mb", dense[:1]), ("ratio", [1.0])):
            if dense and table.is_done(UNPRUNED, column):
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
