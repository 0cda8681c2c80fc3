"""Curves of a run as PNG files in RUN_DIR/plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunFolderError
from ..files import atomic_path
from ..metric_file import METRICS, read_events

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

PLOTS = "plots"
Curve = tuple[Sequence[float], Sequence[float]]
"""(steps, values)."""

_COLORS = {"train": "#4477aa", "validation": "#cc3311"}
_MAX_MARKERS = 40
"""A curve of at most this many points has a marker on each."""


def draw_probe_curves(
    folder: Path, kind: str, history: Sequence[Mapping[str, Any]], *, kept: int | None = None
) -> list[Path]:
    """plots/loss-KIND.png and plots/accuracy-KIND.png, on train and validation; nothing for an empty history.

    history: as ProbeOutcome.history; kept: the iteration whose state was kept, marked by a line. Raises
    RunFolderError.
    """
    paths = []
    for number in ("loss", "accuracy"):
        curves = {split: _curve(history, "iteration", f"{split}_{number}") for split in ("train", "validation")}
        paths += _draw(folder, number, kind, f"{kind} probe", curves, kept)
    return paths


def draw_training_curves(folder: Path) -> list[Path]:
    """plots/loss-pretrain.png, and accuracy-pretrain.png where there is any accuracy, from metrics.jsonl.

    Reads the events "train" and "validation"; lines that are not whole are passed over. Of a step that was trained
    twice (after falling back to an older checkpoint) the last event counts. Returns the files drawn. Raises
    RunFolderError.
    """
    events: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "validation": {}}
    try:
        for event in read_events(folder / METRICS):
            if event["event"] in events:
                events[event["event"]][event["step"]] = event
    except OSError as error:
        raise RunFolderError(f"{folder / METRICS}: cannot be read: {error.strerror}") from None
    paths = []
    for number in ("loss", "accuracy"):
        curves = {
            split: _curve([found[step] for step in sorted(found)], "step", number) for split, found in events.items()
        }
        paths += _draw(folder, number, "pretrain", "pre-training", curves, None)
    return paths


def draw_image_rows(folder: Path, name: str, rows: Mapping[str, Tensor]) -> Path:
    """plots/NAME.png: one row of images [n, C, H, W] in -1..1 for each entry of `rows`. Raises RunFolderError."""
    columns = max(len(images) for images in rows.values())
    figure = _figure((1.0 + columns * 1.1, 0.2 + len(rows) * 1.15))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        pixels = images.detach().float().cpu().add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        for axis in row:
            axis.set_axis_off()
        for axis, image in zip(row, pixels, strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        row[0].set_title(label, loc="left", fontsize=9)
    return _save(figure, folder / PLOTS / f"{name}.png")


def _curve(lines: Sequence[Mapping[str, Any]], step: str, name: str) -> Curve:
    found = [line for line in lines if line.get(name) is not None]
    return [line[step] for line in found], [line[name] for line in found]


def _draw(
    folder: Path, number: str, name: str, title: str, curves: Mapping[str, Curve], kept: int | None
) -> list[Path]:
    curves = {split: curve for split, curve in curves.items() if curve[0]}
    if not curves:
        return []
    figure = _figure((7, 4.2))
    axis = figure.add_subplot()
    for split, (steps, values) in curves.items():
        marker = "o" if len(steps) <= _MAX_MARKERS else None
        axis.plot(steps, values, label=split, color=_COLORS[split], marker=marker, markersize=3, linewidth=1.3)
    _label(axis, number, title, kept)
    return [_save(figure, folder / PLOTS / f"{number}-{name}.png")]


def _figure(size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: it keeps every figure in a global list

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, durable=False) as partial:
            figure.savefig(partial, dpi=120, format="png")
    except OSError as error:
        raise RunFolderError(f"{path}: not written: {error.strerror or error}") from None
    return path


def _label(axis: Axes, number: str, title: str, kept: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    units = {"loss": "loss (mean over images)", "accuracy": "accuracy (fraction)"}
    axis.set(xlabel="iteration (optimizer steps)", ylabel=units[number], title=f"{title}: {number}")
    if number == "accuracy":
        low, _ = axis.get_ylim()
        axis.set_ylim(min(low, 1.0), 1.0 + 0.02)
    if kept is not None:
        axis.axvline(kept, color="0.4", linestyle=":", linewidth=1, label=f"kept: iteration {kept:,}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend()
