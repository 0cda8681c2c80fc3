"""Figures of maps and of neighbors, as PNG and SVG: one color for each class in all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunFolderError, printable
from ..files import atomic_path
from .maps import METHODS, Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
"""Told apart with any kind of color vision (Petroff 2021, arXiv 2107.02270). Ten more classes are triangles."""
MARKERS = ("o", "^")
MAX_NAMED = 20
"""More classes than this are not told apart on one map."""
EMPHASIZED = ("#3f90da", "#ffa90e", "#bd1f01", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#92dadd")
"""Of COLORS, without the grays: of the classes in color where all others are gray."""
OTHERS = "#d5d8dc"
INK = "#333333"
VECTOR_POINTS = 5000
"""In a figure with more points, they are an image within its SVG."""
LEGEND_NAME = 24
"""Characters of a class's name in a legend."""


@dataclass(frozen=True)
class FittedMap:
    """One map of the images of a sample."""

    space: str
    method: str
    version: str
    """Of the weights: "" of the best checkpoint, "initial", or step-N; always "" for pixels."""
    caption: str
    """Which weights, for a reader; empty for pixels."""
    points: Array
    """float [n, 2]."""
    trustworthiness: float
    explained: Array | None = None
    """The shares of the variance of the two principal components."""

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.version, self.space, self.method) if part)

    @property
    def title(self) -> str:
        return f"{self.space}, {self.caption}" if self.caption else self.space


@dataclass(frozen=True)
class Classes:
    """How the points of each class are drawn, the same on every map."""

    labels: Array
    """int64 [n]."""
    styles: Mapping[int, tuple[str, str]]
    """(color, marker) by class; all others are gray."""
    legend: Sequence[tuple[str, str, str]]
    """(name, color, marker)."""

    @property
    def legend_width(self) -> float:
        """Inches of the legend's widest entry, about."""
        return 0.45 + 0.085 * max((len(name) for name, _, _ in self.legend), default=0)

    @classmethod
    def of(cls, labels: Array, names: Sequence[str]) -> Classes:
        """Of at most 20 classes, each has a color and marker. Of more, eight evenly spaced ones have a color. Without
        names there are no labels: one color, and no legend."""
        if not names:
            return cls(labels, dict.fromkeys(np.unique(labels).tolist(), (COLORS[0], MARKERS[0])), [])
        present = [int(label) for label in np.unique(labels)]
        if len(present) <= MAX_NAMED:
            styles = {c: (COLORS[i % len(COLORS)], MARKERS[i // len(COLORS)]) for i, c in enumerate(present)}
            rest = []
        else:
            shown = [present[i * len(present) // len(EMPHASIZED)] for i in range(len(EMPHASIZED))]
            styles = {c: (color, MARKERS[0]) for c, color in zip(shown, EMPHASIZED, strict=True)}
            rest = [(f"{len(present) - len(shown):,} other classes", OTHERS, MARKERS[0])]
        return cls(labels, styles, [(shortened(names[c]), *style) for c, style in styles.items()] + rest)


def shortened(name: str, length: int = LEGEND_NAME) -> str:
    name = printable(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


@contextmanager
def drawing() -> Iterator[None]:
    """Figures must be made and saved inside: text is shown as it is, and the same figure gives the same file."""
    from matplotlib import rc_context

    with warnings.catch_warnings(), rc_context({"text.parse_math": False, "svg.hashsalt": "maps"}):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of names in other scripts
        yield


def save_figure(figure: Figure, path: Path, formats: Sequence[str] = ("png", "svg")) -> None:
    """PATH.png and PATH.svg, replaced as a whole. Raises RunFolderError."""
    for kind in formats:
        file = path.with_name(f"{path.name}.{kind}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(file, durable=False) as partial:
                metadata = {"Software": None} if kind == "png" else {"Date": None}
                figure.savefig(partial, dpi=160 if kind == "png" else 300, format=kind, metadata=metadata)
        except OSError as error:
            raise RunFolderError(f"{file}: not written: {error.strerror or error}") from None


def map_figure(drawn: FittedMap, classes: Classes, about: str) -> Figure:
    """One map with its legend. about: a line on what the points are."""
    side, left, top, bottom = 4.6, 0.3, 0.42, 0.55
    names = classes.legend_width
    page = _Page(left + side + 0.1 + names, top + side + bottom)
    axis = page.axes(left, top, side)
    _draw_points(axis, drawn, classes, size=1.0, in_figure=len(drawn.points))
    page.text(left + side / 2, 0.22, f"{METHODS[drawn.method].title}: {drawn.title}", 10.5)
    page.text(left + side / 2, page.height - 0.14, about, 7.5)
    rows = len(classes.legend)
    page.legend(classes, left + side + 0.12, top + side / 2 - 0.1 * rows, columns=1)
    return page.figure


def overview_figure(maps: Sequence[FittedMap], classes: Classes, title: str, details: Mapping[str, str]) -> Figure:
    """All maps: a block for each method, in it the pixels, then a row for each other space, earlier weights first.

    details: method -> what its block's title says besides its name.
    """
    side, gap, between, header, top = 2.35, 0.3, 0.46, 0.42, 0.62
    methods = list(dict.fromkeys(m.method for m in maps))
    first = [m for m in maps if m.method == methods[0]]
    spaces = list(dict.fromkeys(m.space for m in first if m.space != "pixels"))
    rows, indent = max(1, len(spaces)), int(any(m.space == "pixels" for m in first))
    columns = indent + len({m.version for m in first if m.space != "pixels"})
    block = header + rows * (side + between)
    width = max(columns * (side + gap) + 0.15, 4.0)
    in_legend = max(1, min(len(classes.legend), 10, int((width - 0.2) / classes.legend_width)))
    entries = -(-len(classes.legend) // in_legend)
    page = _Page(width, top + len(methods) * block + 0.22 * entries + 0.15)
    page.text(page.width / 2, 0.34, title, 11)
    left = (page.width - columns * (side + gap)) / 2 + 0.22
    total = sum(len(m.points) for m in maps)
    for k, method in enumerate(methods):
        above = top + k * block
        page.text(page.width / 2, above + 0.1, METHODS[method].title + details.get(method, ""), 10.5, weight="bold")
        column = dict.fromkeys(spaces, indent)
        for drawn in (m for m in maps if m.method == method):
            if drawn.space == "pixels":  # beside all rows: what every row starts from
                row, at = (rows - 1) / 2, 0
            else:
                row, at = spaces.index(drawn.space), column[drawn.space]
                column[drawn.space] += 1
            x, y = left + at * (side + gap), above + header + row * (side + between)
            _draw_points(page.axes(x, y, side), drawn, classes, size=0.45, in_figure=total)
            page.text(x + side / 2, y - 0.1, drawn.title, 8.5)
    page.legend(
        classes, (width - in_legend * classes.legend_width) / 2 + 0.1, page.height - 0.22 * entries - 0.1, in_legend
    )
    return page.figure


class _Page:
    """A figure whose parts have their places in inches from its upper left corner.

    Automatic layouts take longer than the rest of a figure, and let the panels of one figure differ in size.
    """

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height))

    def axes(self, left: float, top: float, side: float) -> Axes:
        box = (left / self.width, 1 - (top + side) / self.height, side / self.width, side / self.height)
        return self.figure.add_axes(box)

    def text(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        style = {"ha": "center", "va": "center", "color": INK, **style}
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, **style)

    def legend(self, classes: Classes, left: float, top: float, columns: int) -> None:
        """Row by row. Not matplotlib's, which leaves out names that start with an underscore."""
        from matplotlib.lines import Line2D

        for i, (name, color, marker) in enumerate(classes.legend):
            x, y = left + (i % columns) * classes.legend_width + 0.06, top + (i // columns) * 0.22 + 0.11
            dot = Line2D(
                [x / self.width], [1 - y / self.height], linestyle="", marker=marker, markersize=6, color=color,
                transform=self.figure.transFigure,
            )  # fmt: skip
            self.figure.add_artist(dot)
            self.text(x + 0.11, y, name, 8.5, ha="left")


def _draw_points(axis: Axes, drawn: FittedMap, classes: Classes, *, size: float, in_figure: int) -> None:
    """A square map without ticks: only distances on it have a meaning."""
    points, labels = drawn.points, classes.labels
    area = size * float(np.clip(12_000 / len(points), 3.0, 18.0))
    colors = np.array([classes.styles.get(int(c), (OTHERS, ""))[0] for c in labels])
    markers = np.array([classes.styles.get(int(c), ("", ""))[1] for c in labels])
    # in random order, so that no class covers the others; what is gray below what is not
    order = np.random.default_rng(0).permutation(len(points))
    for marker in ("", *MARKERS):
        rows = order[markers[order] == marker]
        if len(rows):
            x, y = points[rows].T
            vector = in_figure <= VECTOR_POINTS
            shape = marker or MARKERS[0]
            larger = 2 if marker and "" in markers else 1  # the few classes in color among the gray
            axis.scatter(
                x, y, s=area * larger, c=colors[rows], marker=shape, linewidths=0, alpha=0.85, rasterized=not vector
            )
    low, high = points.min(axis=0), points.max(axis=0)
    half = max(0.54 * float((high - low).max()), 1e-9)
    for limits, center in ((axis.set_xlim, (low + high)[0] / 2), (axis.set_ylim, (low + high)[1] / 2)):
        limits(center - half, center + half)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color="0.75", linewidth=0.6)
    notes = [f"trustworthiness {drawn.trustworthiness:.3f}"]
    if np.ptp(points) == 0:
        notes = ["all points are the same"]
    elif drawn.explained is not None:
        notes.insert(0, f"PC 1: {drawn.explained[0]:.0%}")
        axis.set_ylabel(f"PC 2: {drawn.explained[1]:.0%}", fontsize=7, color="0.4", labelpad=2)
    axis.set_xlabel("   ".join(notes), fontsize=7, color="0.4", labelpad=3)
