"""Curves of a run as PNG files in RUN_DIR/plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunFolderError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTS = "plots"
Curve = tuple[Sequence[float], Sequence[float]]
"""(steps, values)."""

_COLOURS = {"train": "#4477aa", "validation": "#cc3311"}
_MARKED = 40  # so few points are marked one by one


def draw_probe_curves(
    folder: Path, kind: str, history: Sequence[Mapping[str, Any]], *, kept: int | None = None
) -> list[Path]:
    """plots/loss-KIND.png and plots/accuracy-KIND.png, on train and validation; nothing for an empty history.

    history: as Outcome.history; kept: the iteration whose state was kept, which is marked. Raises RunFolderError.
    """
    paths = []
    for number in ("loss", "accuracy"):
        curves = {split: _curve(history, "iteration", f"{split}_{number}") for split in ("train", "validation")}
        paths += _draw(folder, number, kind, f"{kind} probe", curves, kept)
    return paths


def draw_training_curves(folder: Path) -> list[Path]:
    """plots/loss-pretrain.png, and accuracy-pretrain.png where there is any accuracy, from metrics.jsonl.

    Reads the events "train" and "validation"; of a step that was trained twice (after a fall-back to an older
    checkpoint) the last counts. Returns what was drawn. Raises RunFolderError.
    """
    events: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "validation": {}}
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for event in map(json.loads, lines):
            if event["event"] in events:
                events[event["event"]][event["step"]] = event
    except OSError as error:
        raise RunFolderError(f"{folder / 'metrics.jsonl'}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{folder / 'metrics.jsonl'}: not a line of metrics: {error}") from None
    paths = []
    for number in ("loss", "accuracy"):
        curves = {
            split: _curve([found[step] for step in sorted(found)], "step", number) for split, found in events.items()
        }
        paths += _draw(folder, number, "pretrain", "pre-training", curves, None)
    return paths


def _curve(lines: Sequence[Mapping[str, Any]], step: str, name: str) -> Curve:
    found = [line for line in lines if line.get(name) is not None]
    return [line[step] for line in found], [line[name] for line in found]


def _draw(
    folder: Path, number: str, name: str, title: str, curves: Mapping[str, Curve], kept: int | None
) -> list[Path]:
    curves = {split: curve for split, curve in curves.items() if curve[0]}
    if not curves:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: it keeps every figure in a global list

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for split, (steps, values) in curves.items():
        marker = "o" if len(steps) <= _MARKED else None
        axis.plot(steps, values, label=split, color=_COLOURS[split], marker=marker, markersize=3, linewidth=1.3)
    _label(axis, number, title, kept)
    path = folder / PLOTS / f"{number}-{name}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        figure.savefig(partial, dpi=120, format="png")
        partial.replace(path)
    except OSError as error:
        raise RunFolderError(f"{path}: not written: {error.strerror or error}") from None
    return [path]


def _label(axis: Axes, number: str, title: str, kept: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    units = {"loss": "loss (mean over images)", "accuracy": "accuracy (fraction)"}
    axis.set(xlabel="iteration (optimiser steps)", ylabel=units[number], title=f"{title}: {number}")
    if number == "accuracy":
        low, _ = axis.get_ylim()
        axis.set_ylim(min(low, 1.0), 1.0 + 0.02)
    if kept is not None:
        axis.axvline(kept, color="0.4", linestyle=":", linewidth=1, label=f"kept: iteration {kept:,}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend()
