"""Tables as Markdown, LaTeX and CSV, with a chart of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import write_atomically
from ..pages.formats import csv_text, latex_table, markdown_table, tex
from ..pages.scores import name_of
from .cells import slug
from .charts import draw
from .folder import FrozenGrid
from .responses import FILE as RESPONSES
from .responses import draw_responses
from .tables import ERRORS, TableData, build_tables, split_of

MISSING, NO_SUCH_SCORE = "missing", "–"
DIGITS = {"sparse_mb": 2, "ratio": 2}
SPLIT_NAMES = {"train": "training", "validation": "validation", "test": "test"}


def write_report(frozen: FrozenGrid, out: Path) -> Path:
    """Write report.md, report.tex, report.csv and one PNG for each table into `out`; returns the Markdown's path."""
    tables = build_tables(frozen)
    out.mkdir(parents=True, exist_ok=True)
    charts = _chart_names(tables)
    for table, name in zip(tables, charts, strict=True):
        draw(table, out / name)
    note = note_of(frozen, tables)
    parts = [f"# {frozen.name}\n\n{note} Code: {frozen.commit}.\n"]
    parts += [
        f"## {t.title}\n\n{markdown(t)}\n![{t.title}]({name})\n" for t, name in zip(tables, charts, strict=True)
    ]
    if draw_responses(frozen, out / RESPONSES):
        parts.append(f"## Gradient responses\n\n![Gradient responses over steps]({RESPONSES})\n")
    write_atomically(out / "report.md", "\n".join(parts))
    write_atomically(out / "report.tex", f"% {note}\n" + "\n".join(latex(table) for table in tables))
    write_atomically(out / "report.csv", to_csv(tables))
    return out / "report.md"


def note_of(frozen: FrozenGrid, tables: Sequence[TableData]) -> str:
    """What the numbers of the tables are."""
    seeds = len({cell.seed for cell in frozen.cells})
    note = "Scores on the test set, fractions; macro averages over classes."
    if any(table.splits != ("test",) for table in tables):
        note = "Scores on the test set where no other split is named, fractions; macro averages over classes."
    if any(score in ERRORS for table in tables for score in table.charts):
        note += f" MAE and MSE: of reconstructed pixels in -1..1; {NO_SUCH_SCORE}: a model without a decoder."
    if seeds > 1:
        note += f" Mean ± half width of the 95 % interval (Student's t) over {seeds} seeds."
    if any(table.layout == "pruning" for table in tables):
        note += " Size: the sparse file; ratio: dense bytes / sparse bytes."
    return note


def _chart_names(tables: Sequence[TableData]) -> list[str]:
    names: list[str] = []
    for table in tables:
        name = slug(table.title)[:100].lower()
        while f"{name}.png" in (*names, RESPONSES):
            name += "-2"
        names.append(f"{name}.png")
    return names


def shown(table: TableData, row: str, column: str, score: str) -> str:
    """`0.9731`, `0.9731 ± 0.0012`, with `(2 of 3)` where seeds are missing; `missing`; `–` where the cell's model
    has no such score; "" for no cell."""
    if (row, column) not in table.expected:
        return ""
    found, digits = table.interval(row, column, score), DIGITS.get(score, 4)
    if found is None:
        return NO_SUCH_SCORE if table.is_done(row, column) else MISSING
    count, expected = len(table.values[row, column, score]), table.expected[row, column]
    text = f"{found[0]:.{digits}f}" + (f" ± {found[1]:.{digits}f}" if count > 1 else "")
    return text if count == expected else f"{text} ({count} of {expected})"


def heading_of(table: TableData, column: str, score: str) -> str:
    """Of a column of numbers: what it is of, and the score where that is not the only one."""
    one_score, one_column = len(table.scores) == 1, table.columns == [""]
    return " ".join([column] * (not one_column) + [_score_name(table, score)] * (not one_score or one_column))


def _score_name(table: TableData, key: str) -> str:
    """`F1`; `test F1` where the table has other splits."""
    score, split = split_of(key)
    has_split = split != "" and table.splits != ("test",)
    return f"{SPLIT_NAMES[split]} {name_of(score)}" if has_split else name_of(score)


def _grid(table: TableData) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text."""
    headings = [table.rows_axis, *(heading_of(table, c, s) for c in table.columns for s in table.scores)]
    rows = [[row, *(shown(table, row, c, s) for c in table.columns for s in table.scores)] for row in table.rows]
    return headings, rows


def markdown(table: TableData) -> str:
    return markdown_table(*_grid(table))


def latex(table: TableData) -> str:
    """A `table` for the booktabs package; if there are several scores, they are grouped by column."""
    headings, rows = _grid(table)
    groups: list[str] = []
    if len(table.scores) > 1 and table.columns != [""]:
        width = len(table.scores)
        names = "".join(rf" & \multicolumn{{{width}}}{{c}}{{{tex(column)}}}" for column in table.columns)
        ends = range(1 + width, len(headings) + 1, width)
        groups = [rf"{names} \\", "".join(rf"\cmidrule(lr){{{end - width + 1}-{end}}}" for end in ends)]
        headings = [table.rows_axis] + [_score_name(table, score) for _ in table.columns for score in table.scores]
    return latex_table(table.title, headings, rows, groups)


def to_csv(tables: Sequence[TableData]) -> str:
    """One line for each number; mean and half_width are empty where there is none."""
    headings = ["table", "rows", "row", "column", "score", "split", "mean", "half_width", "n", "expected"]
    lines: list[list[str | float]] = []
    for table in tables:
        for (row, column), expected in table.expected.items():
            for score in table.scores:
                mean, half = table.interval(row, column, score) or ("", "")
                count = len(table.values.get((row, column, score), []))
                names = [table.title, table.rows_axis, row, column, *split_of(score)]
                lines.append([*names, mean, half, count, expected])
    return csv_text(headings, lines)
