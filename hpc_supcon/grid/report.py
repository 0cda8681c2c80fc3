"""Tables as Markdown, LaTeX and CSV, with a chart of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import atomic_path, write_atomically
from ..report.formats import csv_text, markdown_table, tex
from .cells import slug
from .folder import FrozenGrid
from .tables import TableData, build_tables, is_numeric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "missing"
HEADINGS = {
    "f1": "F1",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "sparse_mb": "size (MB)",
    "ratio": "ratio",
    "knn": "kNN",
    "silhouette": "silhouette",
}
DIGITS = {"sparse_mb": 2, "ratio": 2}
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#999999")
"""The palette of Okabe and Ito, which color-blind readers can distinguish too."""


def write_report(frozen: FrozenGrid, out: Path) -> Path:
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
    """`0.9731`, `0.9731 ± 0.0012`, with `(2 of 3)` where seeds are missing; `missing`; "" for no cell."""
    if (row, column) not in table.expected:
        return ""
    found, digits = table.interval(row, column, score), DIGITS.get(score, 4)
    if found is None:
        return MISSING
    count, expected = len(table.values[row, column, score]), table.expected[row, column]
    text = f"{found[0]:.{digits}f}" + (f" ± {found[1]:.{digits}f}" if count > 1 else "")
    return text if count == expected else f"{text} ({count} of {expected})"


def heading_of(table: TableData, column: str, score: str) -> str:
    """Of a column of numbers: what it is of, and the score where that is not the only one."""
    one_score, one_column = len(table.scores) == 1, table.columns == [""]
    return " ".join([column] * (not one_column) + [HEADINGS[score]] * (not one_score or one_column))


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
    headings = ["table", "rows", "row", "column", "score", "mean", "half_width", "n", "expected"]
    lines: list[list[str | float]] = []
    for table in tables:
        for (row, column), expected in table.expected.items():
            for score in table.scores:
                mean, half = table.interval(row, column, score) or ("", "")
                count = len(table.values.get((row, column, score), []))
                lines.append([table.title, table.rows_axis, row, column, score, mean, half, count, expected])
    return csv_text(headings, lines)


def draw(table: TableData, path: Path) -> None:
    """Write the table's chart as a PNG. Needs no display."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # labels are the user's: "$" in them starts no formula
    with rc_context({"text.parse_math": False}), atomic_path(path, durable=False) as partial:
        FigureCanvasAgg(chart(table)).print_png(partial)


def chart(table: TableData) -> Figure:
    """Lines if the rows are numbers (layouts curve and pruning), else bars; error bars are 95 % intervals."""
    from matplotlib.figure import Figure

    wide = max(6.0, 1.2 + 0.35 * len(table.rows) * len(table.columns))
    figure = Figure(figsize=(min(wide, 16.0), 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(table.title, fontsize=11)
    axes.set_xlabel(table.rows_axis)
    axes.set_ylabel("test accuracy")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not any(score == "accuracy" for _, _, score in table.values):
        axes.text(0.5, 0.5, "no results yet", ha="center", va="center", transform=axes.transAxes, color="#666666")
    elif is_numeric(table) and table.layout in ("curve", "pruning"):
        _lines(axes, table)
    else:
        _bars(axes, table)
    if len(table.columns) > 1 and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


CLOSEST = 1 / 30
"""Distance of two ticks, as a share of the axis, at which their labels of one line would touch."""


def _lines(axes: Axes, table: TableData) -> None:
    has_sizes = any(score == "sparse_mb" for _, _, score in table.values)
    places = _places(table.rows, CLOSEST * (2 if has_sizes else 1))
    for number, column in enumerate(table.columns):
        points = [
            (x, found)
            for x, row in zip(places, table.rows, strict=True)
            if (found := table.interval(row, column, "accuracy"))
        ]
        if points:
            axes.errorbar(
                [x for x, _ in points],
                [mean for _, (mean, _) in points],
                yerr=[half for _, (_, half) in points],
                marker="o",
                capsize=3,
                color=COLORS[number % len(COLORS)],
                label=column,
            )
    _ticks(axes, table, places)


def _places(rows: list[str], closest: float) -> list[float]:
    """Where the rows are on the axis: by their value, or its logarithm if they span a wide range. Rows that are too
    close for their labels are all put at equal distances."""
    values = [float(row) for row in rows]
    positive = [value for value in values if value > 0]
    if positive and max(positive) / min(positive) >= 5:
        # zero is one decade below the smallest value
        values = [math.log10(value) if value > 0 else math.log10(min(positive)) - 1 for value in values]
    span = max(values) - min(values)
    if any(b - a < closest * span for a, b in itertools.pairwise(values)):
        return [float(k) for k in range(len(values))]
    return values


def _ticks(axes: Axes, table: TableData, places: list[float]) -> None:
    """One tick for each row, with its size in MB if there is one."""
    labels = []
    for row in table.rows:
        size = table.interval(row, table.columns[0], "sparse_mb")
        labels.append(f"{row}\n{size[0]:.3g} MB" if size else row)
    axes.set_xticks(places, labels, rotation=90 if len(labels) > 6 else 0)
    axes.minorticks_off()


def _bars(axes: Axes, table: TableData) -> None:
    width = 0.8 / len(table.columns)
    lowest = 1.0
    for number, column in enumerate(table.columns):
        for position, row in enumerate(table.rows):
            x = position + (number - (len(table.columns) - 1) / 2) * width
            found = table.interval(row, column, "accuracy")
            if found is None:
                if (row, column) in table.expected:
                    transform = axes.get_xaxis_transform()
                    axes.text(
                        x, 0.02, "missing", transform=transform, rotation=90, fontsize=7, ha="center", color="#666"
                    )
                continue
            mean, half = found
            lowest = min(lowest, mean - half)
            axes.bar(x, mean, width * 0.9, yerr=half or None, capsize=2, color=COLORS[number % len(COLORS)])
            at, above = (x, mean + half), (0, 3)
            axes.annotate(f"{mean:.3f}", at, above, textcoords="offset points", fontsize=7, ha="center", rotation=90)
        axes.bar(0, 0, color=COLORS[number % len(COLORS)], label=column)
    axes.set_xticks(range(len(table.rows)), table.rows, rotation=20 if max(map(len, table.rows)) > 10 else 0)
    axes.set_xlim(-0.75, len(table.rows) - 0.25)
    axes.margins(y=0.12)
    # bars that start at zero hide differences of one percent
    axes.set_ylim(bottom=max(0.0, lowest - 0.25 * (1.02 - lowest)) if lowest > 0.5 else 0.0)
