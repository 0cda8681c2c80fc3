"""The picture of what a probe confuses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import printable
from .plots import PLOTS, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAR = "#4477aa"
_MAX_MATRIX = 30
"""Of more classes than this, only the pairs that are confused most are drawn."""
_MAX_PAIRS = 20


def draw_confusion(folder: Path, kind: str, confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Path:
    """plots/confusion-KIND.png of the test split: the matrix, or of many classes the pairs that are confused most.

    confusion: samples, rows are true classes. Raises RunFolderError.
    """
    import matplotlib as mpl

    names = [_short(name) for name in classes]
    draw = _matrix if len(names) <= _MAX_MATRIX else _pairs
    # names are the user's: "$" in them starts no formula, and a letter that the font lacks is a box
    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        return save_figure(draw(f"{kind} probe: test", confusion, names), folder / PLOTS / f"confusion-{kind}.png")


def _short(name: str) -> str:
    text = printable(name)
    return text if len(text) <= 24 else f"{text[:12]}…{text[-11:]}"


def _matrix(title: str, confusion: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    n = len(names)
    side = max(3.4, 0.42 * n if n > 12 else 0.5 * n)
    figure = new_figure((side + 2.2, side + 1.4))
    axis = figure.add_subplot()
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 9 if max(map(max, confusion)) < 1000 and n <= 20 else 6.5
    for i, row in enumerate(confusion):
        for j, count in enumerate(row):
            if count:
                color = "white" if shares[i][j] > 0.5 else "black"
                axis.text(j, i, f"{count}", ha="center", va="center", color=color, fontsize=size)
    turned = max(map(len, names)) > 3
    axis.set_xticks(range(n), names, rotation=90 if turned else 0, fontsize=9)
    axis.set_yticks(range(n), names, fontsize=9)
    axis.set(xlabel="prediction", ylabel="true class", title=f"{title}, number of images")
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    return figure


def _pairs(title: str, confusion: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    wrong = [
        (count, count / sum(row), f"{names[i]} → {names[j]}")
        for i, row in enumerate(confusion)
        for j, count in enumerate(row)
        if count and i != j
    ]
    shown = sorted(wrong, key=lambda pair: -pair[0])[:_MAX_PAIRS]
    figure = new_figure((7, 1.2 + 0.28 * max(4, len(shown))))
    axis = figure.add_subplot()
    bars = axis.barh(range(len(shown)), [count for count, _, _ in shown], color=_BAR)
    axis.bar_label(bars, [f"{count} ({share:.0%})" for count, share, _ in shown], padding=3, fontsize=8)
    axis.set_yticks(range(len(shown)), [name for _, _, name in shown], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15, y=0.01)
    axis.set_xlabel("images (share of the true class)")
    figure.suptitle(f"{title}, most frequent confusions: true class → prediction", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    if not shown:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "every prediction is right", ha="center", va="center", transform=axis.transAxes)
    return figure
