"""One chart for each table, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .tables import TableData, is_numeric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#999999")
"""Okabe and Ito's palette: told apart by colour-blind readers too."""


def draw(table: TableData, path: Path) -> None:
    """Lines where the rows are numbers (layouts curve and pruning), else bars; error bars are 95 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide = max(6.0, 1.2 + 0.35 * len(table.rows) * len(table.columns))
    figure = Figure(figsize=(min(wide, 16.0), 4.0), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(table.title, fontsize=11)
    axes.set_xlabel(table.rows_axis)
    axes.set_ylabel("test accuracy")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if not any(score == "accuracy" for _, _, score in table.values):
        axes.text(0.5, 0.5, "no results yet", ha="center", va="center", transform=axes.transAxes, color="#666666")
    elif is_numeric(table) and table.layout in ("curve", "pruning"):
        _lines(axes, table)
    else:
        _bars(axes, table)
    if len(table.columns) > 1 and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    canvas.print_png(path)


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
                color=COLOURS[number % len(COLOURS)],
                label=column,
            )
    values = [float(row) for row in table.rows]
    if min(values) > 0 and max(values) / min(values) >= 8:
        axes.set_xscale("log", base=2 if all(v.is_integer() and int(v) & (int(v) - 1) == 0 for v in values) else 10)
        axes.set_xticks(values, table.rows)
        axes.minorticks_off()
    elif len(values) <= 8:
        axes.set_xticks(values, table.rows)
    if table.layout == "pruning":
        _sizes(axes, table)


def _sizes(axes: Axes, table: TableData) -> None:
    """Names each point of the first column with its size."""
    column = table.columns[0]
    for row in table.rows:
        size, height = table.interval(row, column, "sparse_mb"), table.interval(row, column, "accuracy")
        if size and height:
            axes.annotate(
                f"{size[0]:.3g} MB", (float(row), height[0]), (0, 8), textcoords="offset points", fontsize=8
            )


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
            axes.bar(x, mean, width * 0.9, yerr=half or None, capsize=2, color=COLOURS[number % len(COLOURS)])
            axes.annotate(
                f"{mean:.3f}", (x, mean + half), (0, 2), textcoords="offset points", fontsize=7, ha="center"
            )
        axes.bar(0, 0, color=COLOURS[number % len(COLOURS)], label=column)
    axes.set_xticks(range(len(table.rows)), table.rows, rotation=20 if max(map(len, table.rows)) > 10 else 0)
    # bars from zero hide differences of a per cent; the axis says where it starts
    axes.set_ylim(bottom=max(0.0, lowest - 0.25 * (1.02 - lowest)) if lowest > 0.5 else 0.0)
