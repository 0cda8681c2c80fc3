"""The table of a run's pruned encoders: rate, size, ratio, accuracy, F1, kNN, silhouette."""

from __future__ import annotations

from collections.abc import Sequence

from .read import Run, mapping, number
from .scores import SCORES_OF_PRUNING, is_pruned, name_of, probe_label, split_scores
from .tables import Cell, Table, number_cell, text_cell


def pruning_table(runs: Sequence[Run]) -> Table | None:
    """A row for each pruned encoder and probe, of the test split; columns that no row has are left out."""
    found = []
    for run in runs:
        scores = split_scores(run)
        for result in run.results:
            own = scores.get((probe_label(result), "test"))
            if is_pruned(result) and own is not None:
                found.append((run, result, own))
    if not found:
        return None
    columns = [name for name in SCORES_OF_PRUNING if any(number(own.get(name)) is not None for _, _, own in found)]
    several = len(runs) > 1
    headings = [*(["run"] if several else []), "method", "scope", "schedule", "probe", "rate"]
    table = Table("Pruned encoders, test", [*headings, *map(name_of, columns)])
    for run, result, own in found:
        about = mapping(result.get("prune"))
        rate = number(about.get("rate"))
        texts = [about.get("method"), about.get("scope"), about.get("schedule"), result.get("probe")]
        row = [*([text_cell(run.label)] if several else []), *(text_cell("" if t is None else t) for t in texts)]
        row += [Cell("" if rate is None else f"{rate:.4g}", rate)]
        table.rows.append([*row, *(number_cell(number(own.get(name))) for name in columns)])
    return table
