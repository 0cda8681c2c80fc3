"""One chart for each table, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .tables import TableData, is_numeric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#999999")
"""Okabe and Ito's palette: told apart by color-blind readers too."""


def draw(table: TableData, path: Path) -> None:
    """The table's chart as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(chart(table)).print_png(path)


def chart(table: TableData) -> Figure:
    """Lines where the rows are numbers (layouts curve and pruning), else bars; error bars are 95 % intervals."""
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


def _lines(axes: Axes, table: TableData) -> None:
    for number, column in enumerate(table.columns):
        points = [(float(row), found) for row in table.rows if (found := table.interval(row, column, "accuracy"))]
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
    _scale(axes, table)


def _scale(axes: Axes, table: TableData) -> None:
    """One tick for each row, with its size under it where there is one; logarithmic where the rows span much."""
    values = [float(row) for row in table.rows]
    positive = [value for value in values if value > 0]
    if positive and max(positive) / min(positive) >= 5:
        if len(positive) == len(values):
            axes.set_xscale("log")
        else:  # zero has a place of its own
            axes.set_xscale("symlog", linthresh=min(positive))
    labels = []
    for row in table.rows:
        size = table.interval(row, table.columns[0], "sparse_mb")
        labels.append(f"{row}\n{size[0]:.3g} MB" if size else row)
    axes.set_xticks(values, labels, rotation=90 if len(labels) > 6 else 0)
    axes.minorticks_off()


def _bars(axes: Axes, table: TableData) -> None:
    width = 0.8 / len(table.columns)
    lowest = 1.0
    for number, column in enumerate(table.columns):
        for place, row in enumerate(table.rows):
            x = place + (number - (len(table.columns) - 1) / 2) * width
            found = table.interval(row, column, "accuracy")
            if found is None:
                if (row, column) in table.expected:
                    place_of = axes.get_xaxis_transform()
                    axes.text(
                        x, 0.02, "missing", transform=place_of, rotation=90, fontsize=7, ha="center", color="#666"
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
    # bars from zero hide differences of a per cent; the axis says where it starts
    axes.set_ylim(bottom=max(0.0, lowest - 0.25 * (1.02 - lowest)) if lowest > 0.5 else 0.0)
