"""The tables of a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..config import flatten, load_config
from ..errors import printable
from .compare import Comparison, difference_text, mean_text
from .formats import duration, shown
from .read import LATER, Run, interval_of, mapping, number, numbers, settings_that_differ
from .scores import is_pruned, name_of, ordered, probe_label, sections_of, split_scores

COLUMNS = 4
"""Runs that have a column each in a table of settings; of more, values are counted."""


class Cell(NamedTuple):
    """Text, what it is sorted by (None: last), whether it is emphasized, and a second line."""

    text: str
    value: float | str | None = None
    mark: bool = False
    detail: str = ""


@dataclass
class Table:
    """A table of a page. filter: it can be reduced to the rows that have a marked cell, under this name."""

    title: str
    headings: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""
    filter: str = ""
    sortable: bool = True
    charts: list[int] = field(default_factory=list)
    """Of the page's charts, those that are drawn above it."""

    @property
    def prose(self) -> bool:
        """Whether its cells are paths, commands and sentences, which may break anywhere."""
        return len(self.headings) <= COLUMNS + 2 and not any(self.numeric)

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers, so that it stands to the right. A word in place of one has no value."""
        columns = [[row[i].value for row in self.rows if row[i].text] for i in range(len(self.headings))]
        return [
            any(isinstance(v, float) for v in values) and not any(isinstance(v, str) for v in values)
            for values in columns
        ]


def text_cell(text: object, *, mark: bool = False) -> Cell:
    shown_text = printable(text)
    return Cell(shown_text, shown_text, mark)


def number_cell(value: float | None, interval: tuple[float, float] | None = None) -> Cell:
    """A score, with its 95 % interval where there is one; empty for None."""
    if value is None:
        return Cell("")
    return Cell(shown(value), value, detail=f"{shown(interval[0])} – {shown(interval[1])}" if interval else "")


def results_table(runs: Sequence[Run]) -> Table | None:
    """A row for each run, probe and split; pruned encoders have a table of their own."""
    pruned = {id(run): {probe_label(r) for r in run.results if is_pruned(r)} for run in runs}
    found = [
        (run, key, scores)
        for run in runs
        for key, scores in split_scores(run).items()
        if key[0] not in pruned[id(run)]
    ]
    names = {name for _, _, scores in found for name in scores if number(scores[name]) is not None}
    columns = ordered(names - {"samples"})
    if not found:
        return None
    several = len(runs) > 1
    counted = any(number(scores.get("samples")) is not None for _, _, scores in found)
    headings = [*(["run"] if several else []), "probe", "split", *(["images"] if counted else [])]
    headings += map(name_of, columns)
    table = Table("Scores", headings, note="Below a score: its 95 % interval over images.")
    for run, (kind, split), scores in found:
        cells = [number_cell(number(scores.get(c)), interval_of(scores.get(f"{c}_interval"))) for c in columns]
        samples = number(scores.get("samples"))
        images = [Cell("" if samples is None else f"{samples:,.0f}", samples)] if counted else []
        row = [text_cell(kind), text_cell(split), *images, *cells]
        table.rows.append([text_cell(run.label), *row] if several else row)
    if not any(cell.detail for row in table.rows for cell in row):
        table.note = ""
    return table


def comparison_tables(comparison: Comparison) -> list[Table]:
    tables = []
    for section, scores in comparison.sections.items():
        table = Table(section, ["runs", "seeds", *map(name_of, scores)])
        for group in comparison.groups:
            cells = [
                Cell(
                    mean_text(group, section, score), found[0] if (found := group.interval(section, score)) else None
                )
                for score in scores
            ]
            seeds = len({str(run.seed) for run in group.runs})
            table.rows.append([text_cell(group.label), Cell(str(seeds), float(seeds)), *cells])
        tables.append(table)
        differences = Table(
            f"{section}: difference to {comparison.groups[0].label}", ["runs", "pairs", *map(name_of, scores)]
        )
        for group in comparison.groups[1:]:
            found_all = [comparison.difference(group, section, score) for score in scores]
            pairs = max((one[2] for one in found_all if one), default=0)
            cells = [
                # an interval that does not hold zero
                Cell(difference_text(one), one[0], one[2] > 1 and abs(one[0]) > one[1]) if one else Cell("")
                for one in found_all
            ]
            if pairs:
                differences.rows.append([text_cell(group.label), Cell(str(pairs), float(pairs)), *cells])
        if differences.rows:
            differences.note = "Paired by seed. Marked: the 95 % interval does not hold zero."
            tables.append(differences)
    return tables


def per_class_tables(run: Run) -> list[Table]:
    """For the test split of each probe: F1, precision, recall and number of images of every class."""
    tables = []
    for kind, entry in mapping(run.scores.get("probes")).items():
        for split, scores in mapping(mapping(entry).get("splits")).items():
            columns = {name: numbers(v) for name, v in mapping(mapping(scores).get("per_class")).items()}
            classes = mapping(entry).get("classes")
            if split != "test" or not columns or not isinstance(classes, list):
                continue
            keys = [*(name for name in ("f1", "precision", "recall", "samples") if name in columns)]
            table = Table(f"Classes, {kind} probe", ["class", *map(name_of, keys)])
            for i, name in enumerate(classes):
                values = [columns[key][i] if i < len(columns[key]) else None for key in keys]
                cells = [
                    Cell(f"{v:,.0f}", v) if key == "samples" and v is not None else number_cell(v)
                    for key, v in zip(keys, values, strict=True)
                ]
                table.rows.append([text_cell(name), *cells])
            tables.append(table)
    return tables


def section_tables(runs: Sequence[Run], prefix: str, title: str, first: str) -> Table | None:
    """One table of the sections of `sections_of` that begin with `prefix`: a row for each run and name after it."""
    found = []
    for run in runs:
        for section, scores in sections_of(run).items():
            if section.startswith(f"{prefix}, "):
                found.append((run, section[len(prefix) + 2 :], scores))
    if not found:
        return None
    columns = ordered({name for _, _, scores in found for name in scores})
    several = len(runs) > 1
    table = Table(title, [*(["run"] if several else []), first, *map(name_of, columns)])
    for run, name, scores in found:
        row = [text_cell(name), *(number_cell(scores.get(column)) for column in columns)]
        table.rows.append([text_cell(run.label), *row] if several else row)
    return table


def corruption_table(run: Run) -> list[Table]:
    """The error for each corruption and severity, of each kind of probe."""
    tables = []
    for kind, entry in mapping(run.scores.get("corruptions")).items():
        errors = {name: numbers(values) for name, values in mapping(mapping(entry).get("errors")).items()}
        if not errors:
            continue
        worst = max(map(len, errors.values()))
        headings = ["corruption", *(f"severity {i + 1}" for i in range(worst)), "mean"]
        clean, mce = number(mapping(entry).get("clean")), number(mapping(entry).get("mce"))
        note = "; ".join(
            f"{name} {shown(value)}" for name, value in (("clean", clean), ("mean", mce)) if value is not None
        )
        table = Table(f"Error under corruptions, {kind} probe", headings, note=f"Error: {note}." if note else "")
        for name, values in errors.items():
            there = [v for v in values if v is not None]
            mean = sum(there) / len(there) if there else None
            padded = [*values, *[None] * (worst - len(values))]
            table.rows.append([text_cell(name), *map(number_cell, padded), number_cell(mean)])
        tables.append(table)
    return tables


def settings_table(runs: Sequence[Run]) -> Table | None:
    """Every setting. Marked: for one run, what is not the default; for several, what is not the same in all."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    if not keys:
        return None
    defaults = flatten(load_config())
    different = set(settings_that_differ(runs)) if len(runs) > 1 else set()
    if len(runs) == 1:
        different = {k for k in keys if k not in LATER and k in defaults and runs[0].config[k] != defaults[k]}
    columns = [run.label for run in runs] if len(runs) <= COLUMNS else ["values"]
    if len(runs) == 1:
        columns = ["value"]
    choice = "only what differs" if len(runs) > 1 else "only what is not the default"
    table = Table("Settings", ["setting", *columns, "default"], filter=choice)
    for key in keys:
        if len(runs) <= COLUMNS:
            values = [_value(run.config.get(key)) for run in runs]
        else:
            counts = Counter(_value(run.config.get(key)) for run in runs)
            values = [", ".join(f"{v} ({n} runs)" if n > 1 else v for v, n in counts.most_common(12))]
        mark = key in different
        default = _value(defaults[key]) if key in defaults else ""
        table.rows.append([text_cell(key), *(text_cell(v, mark=mark) for v in values), text_cell(default)])
    return table


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def facts_tables(title: str, facts: Sequence[dict[str, str]], runs: Sequence[Run]) -> list[Table]:
    """What all runs have in common as a list, and the rest with a row for each run."""
    names = list(dict.fromkeys(name for one in facts for name in one))
    common = [name for name in names if all(one.get(name) == facts[0].get(name) for one in facts)]
    tables = []
    if common:
        table = Table(title if len(runs) == 1 else f"{title}: the same in all runs", ["", "value"], sortable=False)
        table.rows = [[text_cell(name), text_cell(facts[0][name])] for name in common]
        tables.append(table)
    if rest := [name for name in names if name not in common]:
        table = Table(f"{title}: of each run", ["run", *rest])
        table.rows = [
            [text_cell(run.label), *(text_cell(one.get(name, "")) for name in rest)]
            for run, one in zip(runs, facts, strict=True)
        ]
        tables.append(table)
    return tables


def phases_table(run: Run, breakdown: dict[str, Any]) -> Table | None:
    """The time of a step by phase, where train.profile measured it."""
    total = number(breakdown.get("step_ms"))
    phases = {k[:-3]: v for k in breakdown if k.endswith("_ms") and k != "step_ms" and (v := number(breakdown[k]))}
    if not total or not phases:
        return None
    title = f"A step by phase: {shown(total, 2)} ms"
    table = Table(f"{title}, {run.label}", ["phase", "ms", "share"])
    for name, ms in sorted(phases.items(), key=lambda item: -item[1]):
        share = ms / total
        table.rows.append([text_cell(name.replace("_", " ")), Cell(shown(ms, 2), ms), Cell(f"{share:.1%}", share)])
    return table


def hours(seconds: float, ranks: float) -> str:
    """`1.25 h (20 min on 4 ranks)`."""
    return f"{seconds * ranks / 3600:.2f} h" if seconds * ranks >= 360 else duration(seconds * ranks)
