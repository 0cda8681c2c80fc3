"""Tables as Markdown, LaTeX and CSV, with a chart of each."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from ..files import write_atomically
from .cells import slug
from .charts import draw
from .folder import Frozen
from .tables import TableData, build_tables

MISSING = "missing"
HEADINGS = {
    "f1": "F1",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "sparse_mb": "size (MB)",
    "ratio": "ratio",
}
DIGITS = {"sparse_mb": 2, "ratio": 2}


def write_report(frozen: Frozen, out: Path) -> Path:
    """Write report.md, report.tex, report.csv and one PNG for each table into `out`; returns the Markdown's path."""
    tables = build_tables(frozen)
    out.mkdir(parents=True, exist_ok=True)
    charts = _chart_names(tables)
    for table, name in zip(tables, charts, strict=True):
        draw(table, out / name)
    seeds = len({cell.seed for cell in frozen.cells})
    note = "Scores on the test set, fractions; macro averages over classes."
    if seeds > 1:
        note += f" Mean ± half width of the 95 % interval (Student's t) over {seeds} seeds."
    if any(table.layout == "pruning" for table in tables):
        note += " Size: the sparse file; ratio: dense bytes / sparse bytes."
    parts = [f"# {frozen.name}\n\n{note} Code: {frozen.commit}.\n"]
    parts += [
        f"## {t.title}\n\n{markdown(t)}\n![{t.title}]({name})\n" for t, name in zip(tables, charts, strict=True)
    ]
    write_atomically(out / "report.md", "\n".join(parts))
    write_atomically(out / "report.tex", f"% {note}\n" + "\n".join(latex(table) for table in tables))
    write_atomically(out / "report.csv", to_csv(tables))
    return out / "report.md"


def _chart_names(tables: Sequence[TableData]) -> list[str]:
    names: list[str] = []
    for table in tables:
        name = slug(table.title)[:100].lower()
        while f"{name}.png" in names:
            name += "-2"
        names.append(f"{name}.png")
    return names


def shown(table: TableData, row: str, column: str, score: str) -> str:
    """`0.9731`, `0.9731 ± 0.0012`, with `(2 of 3)` where seeds are missing; `missing`; "" for no such cell."""
    if (row, column) not in table.expected:
        return ""
    found, digits = table.interval(row, column, score), DIGITS.get(score, 4)
    if found is None:
        return MISSING
    count, expected = len(table.values[row, column, score]), table.expected[row, column]
    text = f"{found[0]:.{digits}f}" + (f" ± {found[1]:.{digits}f}" if count > 1 else "")
    return text if count == expected else f"{text} ({count} of {expected})"


def _grid(table: TableData) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text."""
    one_score, one_column = len(table.scores) == 1, table.columns == [""]
    headings = [table.rows_axis]
    for column in table.columns:
        for score in table.scores:
            parts = [column] * (not one_column) + [HEADINGS[score]] * (not one_score or one_column)
            headings.append(" ".join(parts))
    rows = [[row, *(shown(table, row, c, s) for c in table.columns for s in table.scores)] for row in table.rows]
    return headings, rows


def markdown(table: TableData) -> str:
    headings, rows = _grid(table)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"

    return line(headings) + "|" + "---|" + "---:|" * (len(headings) - 1) + "\n" + "".join(map(line, rows))


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "\n": " ",
}  # fmt: skip


def latex(table: TableData) -> str:
    """A `table` for the booktabs package; several scores stand under their column's name."""

    def tex(text: str) -> str:
        return "".join(_TEX.get(character, character) for character in text)

    headings, rows = _grid(table)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{tex(table.title)}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}", r"\toprule"]
    if len(table.scores) > 1 and table.columns != [""]:
        width = len(table.scores)
        groups = "".join(rf" & \multicolumn{{{width}}}{{c}}{{{tex(column)}}}" for column in table.columns)
        ends = range(1 + width, len(headings) + 1, width)
        lines += [rf"{groups} \\", "".join(rf"\cmidrule(lr){{{end - width + 1}-{end}}}" for end in ends)]
        headings = [table.rows_axis] + [HEADINGS[score] for _ in table.columns for score in table.scores]
    lines += [" & ".join(map(tex, headings)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(tex, row)) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def to_csv(tables: Sequence[TableData]) -> str:
    """One line for each number: table, row, column, score, mean, half_width, n, expected; empty where missing."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "rows", "row", "column", "score", "mean", "half_width", "n", "expected"])
    for table in tables:
        for (row, column), expected in table.expected.items():
            for score in table.scores:
                mean, half = table.interval(row, column, score) or ("", "")
                count = len(table.values.get((row, column, score), []))
                writer.writerow([table.title, table.rows_axis, row, column, score, mean, half, count, expected])
    return buffer.getvalue()
