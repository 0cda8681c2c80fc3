"""The charts of a grid's tables."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..files import atomic_path
from ..pages.scores import name_of
from .tables import ERRORS, TableData, is_numeric, key_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#999999")
"""The palette of Okabe and Ito, which color-blind readers can distinguish too."""
HATCHES = {"train": "....", "validation": "////", "test": None}
DASHES = {"train": "2 3", "validation": "6 4", "test": ""}
"""Of a page's lines, pixels that are drawn and left out."""
LINES: dict[str, Literal[":", "--", "-"]] = {"train": ":", "validation": "--", "test": "-"}


def draw(table: TableData, path: Path) -> None:
    """Write the table's chart as a PNG. Needs no display."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # labels are the user's: "$" in them starts no formula
    with rc_context({"text.parse_math": False}), atomic_path(path, durable=False) as partial:
        FigureCanvasAgg(chart(table)).print_png(partial)


def series_of(table: TableData, score: str) -> list[tuple[str, str]]:
    """(column, split) of each line or color of bars of the chart of `score`."""
    return [(column, split) for column in table.columns for split in table.splits if _has(table, score, split)]


def _has(table: TableData, score: str, split: str) -> bool:
    return key_of(score, split) in table.scores


def has_lines(table: TableData) -> bool:
    return is_numeric(table) and table.layout in ("curve", "pruning")


def chart(table: TableData) -> Figure:
    """One panel for each score of `table.charts`: lines if the rows are numbers (layouts curve and pruning), else
    bars; error bars are 95 % intervals."""
    from matplotlib.figure import Figure

    wide = max(6.0, 1.2 + 0.35 * len(table.rows) * len(table.columns) * len(table.splits))
    figure = Figure(figsize=(min(wide, 16.0), 1.0 + 3.0 * len(table.charts)), layout="constrained")
    figure.suptitle(table.title, fontsize=11)
    panels = figure.subplots(len(table.charts), squeeze=False, sharex=True)[:, 0]
    for axes, score in zip(panels, table.charts, strict=True):
        axes.set_ylabel(f"{table.splits[0]} {name_of(score)}" if len(table.splits) == 1 else name_of(score))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if not any((r, c, key_of(score, s)) in table.values for r in table.rows for c, s in series_of(table, score)):
            axes.text(0.5, 0.5, "no results yet", ha="center", va="center", transform=axes.transAxes, color="#666666")
        elif has_lines(table):
            _lines(axes, table, score)
        else:
            _bars(axes, table, score)
    panels[-1].set_xlabel(table.rows_axis)
    if len(table.columns) * len(table.splits) > 1:
        _legend(panels[0], table)
    return figure


def _legend(axes: Axes, table: TableData) -> None:
    """Colors are columns, hatches and dashes are splits."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Line2D | Patch] = []
    lines, gray = has_lines(table), "#666666"
    if len(table.columns) > 1:
        for column, color in zip(table.columns, itertools.cycle(COLORS), strict=False):
            bar = Patch(color=color, label=column)
            entries.append(Line2D([], [], color=color, marker="o", label=column) if lines else bar)
    if len(table.splits) > 1:
        for split in table.splits:
            face = gray if split == "test" else "white"
            bar = Patch(facecolor=face, edgecolor=gray, hatch=HATCHES[split], label=split)
            entries.append(Line2D([], [], color=gray, linestyle=LINES[split], label=split) if lines else bar)
    axes.legend(handles=entries, frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))


CLOSEST = 1 / 30
"""Distance of two ticks, as a share of the axis, at which their labels of one line would touch."""


def _lines(axes: Axes, table: TableData, score: str) -> None:
    has_sizes = any(score == "sparse_mb" for _, _, score in table.values)
    places = _places(table.rows, CLOSEST * (2 if has_sizes else 1))
    for column, split in series_of(table, score):
        points = [
            (x, found)
            for x, row in zip(places, table.rows, strict=True)
            if (found := table.interval(row, column, key_of(score, split)))
        ]
        if points:
            axes.errorbar(
                [x for x, _ in points],
                [mean for _, (mean, _) in points],
                yerr=[half for _, (_, half) in points],
                marker="o",
                capsize=3,
                color=COLORS[table.columns.index(column) % len(COLORS)],
                linestyle=LINES[split],
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


def _bars(axes: Axes, table: TableData, score: str) -> None:
    """A group of bars for each row; the splits of a column stand beside each other in its color."""
    series = series_of(table, score)
    width = 0.8 / len(series)
    lowest = 1.0
    for number, (column, split) in enumerate(series):
        color = COLORS[table.columns.index(column) % len(COLORS)]
        for position, row in enumerate(table.rows):
            x = position + (number - (len(series) - 1) / 2) * width
            found = table.interval(row, column, key_of(score, split))
            if found is None:
                if (row, column) in table.expected and not table.is_done(row, column):
                    transform = axes.get_xaxis_transform()
                    axes.text(
                        x, 0.02, "missing", transform=transform, rotation=90, fontsize=7, ha="center", color="#666"
                    )
                continue
            mean, half = found
            lowest = min(lowest, mean - half)
            face = color if split == "test" else "white"
            axes.bar(
                x,
                mean,
                width * 0.9,
                yerr=half or None,
                capsize=2,
                hatch=HATCHES[split],
                facecolor=face,
                edgecolor=color,
            )
            at, above = (x, mean + half), (0, 3)
            text = f"{mean:.3g}" if score in ERRORS else f"{mean:.3f}"
            axes.annotate(text, at, above, textcoords="offset points", fontsize=7, ha="center", rotation=90)
    axes.set_xticks(range(len(table.rows)), table.rows, rotation=20 if max(map(len, table.rows)) > 10 else 0)
    axes.set_xlim(-0.75, len(table.rows) - 0.25)
    axes.margins(y=0.12)
    # bars that start at zero hide differences of one percent
    is_high = lowest > 0.5 and score not in ERRORS
    axes.set_ylim(bottom=max(0.0, lowest - 0.25 * (1.02 - lowest)) if is_high else 0.0)
    if score not in ERRORS:
        axes.set_yticks([tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= 1])
