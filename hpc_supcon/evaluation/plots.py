"""Curves of a run as PNG files in RUN_DIR/plots."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunFolderError, printable
from ..files import atomic_path
from ..metric_file import METRICS, read_events

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor


PLOTS = "plots"
Curve = tuple[Sequence[float], Sequence[float]]
"""(steps, values)."""

_COLORS = {"train": "#4477aa", "validation": "#cc3311", "positives": "#228833", "negatives": "#aa3377"}
_MAX_MARKERS = 40
"""A curve of at most this many points has a marker on each."""
_PANELS: dict[str, dict[str, tuple[str, str]]] = {
    "loss": {"train": ("train", "loss"), "validation": ("validation", "loss")},
    "accuracy (fraction)": {"validation": ("validation", "accuracy")},
    "alignment of positives": {"train": ("train", "alignment")},
    "uniformity": {"train": ("train", "uniformity")},
    "effective rank": {"train": ("train", "effective_rank")},
    "mean cosine similarity": {"train": ("train", "mean_similarity")},
    "gradient response": {
        "positives": ("train", "response_positives"),
        "negatives": ("train", "response_negatives"),
    },
    "gradient norm": {"train": ("train", "grad_norm")},
    "learning rate": {"train": ("train", "lr")},
    "throughput (images/s)": {"train": ("train", "images_per_s")},
    "waiting for data (fraction)": {"train": ("train", "data_wait")},
}
"""Of plots/training.png: title -> curve -> (event of metrics.jsonl, number)."""
_FROM_ZERO = {"gradient norm", "learning rate", "throughput (images/s)", "waiting for data (fraction)"}


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
    """plots/loss-pretrain.png, accuracy-pretrain.png where there is any accuracy, and training.png, a small panel for
    each number of the log, from metrics.jsonl; nothing where there are no steps.

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
    lines = {event: [found[step] for step in sorted(found)] for event, found in events.items()}
    paths = []
    for number in ("loss", "accuracy"):
        curves = {split: _curve(lines[split], "step", number) for split in lines}
        paths += _draw(folder, number, "pretrain", "pre-training", curves, None)
    return paths + _draw_panels(folder, lines)


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


def draw_image_rows(folder: Path, name: str, rows: Mapping[str, Tensor]) -> Path:
    """plots/NAME.png: one row of images [n, C, H, W] in -1..1 for each entry of `rows`. Raises RunFolderError."""
    columns = max(len(images) for images in rows.values())
    figure = new_figure((1.0 + columns * 1.1, 0.2 + len(rows) * 1.15))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        pixels = images.detach().float().cpu().add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        for axis in row:
            axis.set_axis_off()
        for axis, image in zip(row, pixels, strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        row[0].set_title(label, loc="left", fontsize=9)
    return save_figure(figure, folder / PLOTS / f"{name}.png")


def draw_corruptions(folder: Path, found: Mapping[str, Mapping[str, Any]]) -> Path:
    """plots/corruptions.png: a panel for each corruption, error against severity, a line for each probe.

    found: by kind of probe, as robustness.corruption_errors. Severity 0 is the clean images. Raises RunFolderError.
    """
    names = list(next(iter(found.values()))["errors"])
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure((1.2 + 2.1 * columns, 1.1 + 1.75 * rows))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        for kind, scores in found.items():
            errors = [scores["clean"], *scores["errors"][name]]
            axis.plot(range(len(errors)), errors, marker="o", markersize=2.5, linewidth=1.2, label=kind)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xticks(range(6))
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7, labelbottom=True)
    axes[0, 0].set_ylim(bottom=0)
    figure.supxlabel("severity (0: clean)", fontsize=9)
    figure.supylabel("test error (fraction)", fontsize=9)
    handles, kinds = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, kinds, loc="outside upper center", ncols=min(6, len(kinds)), fontsize=8, frameon=False)
    return save_figure(figure, folder / PLOTS / "corruptions.png")


def _curve(lines: Sequence[Mapping[str, Any]], step: str, name: str) -> Curve:
    found = [line for line in lines if line.get(name) is not None]
    return [line[step] for line in found], [line[name] for line in found]


def _draw(
    folder: Path, number: str, name: str, title: str, curves: Mapping[str, Curve], kept: int | None
) -> list[Path]:
    curves = {split: curve for split, curve in curves.items() if curve[0]}
    if not curves:
        return []
    figure = new_figure((7, 4.2))
    axis = figure.add_subplot()
    _plot(axis, curves)
    _label(axis, number, title, kept)
    return [save_figure(figure, folder / PLOTS / f"{number}-{name}.png")]


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
    bars = axis.barh(range(len(shown)), [count for count, _, _ in shown], color=_COLORS["train"])
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


def _draw_panels(folder: Path, lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Path]:
    """plots/training.png; only panels that have a curve."""
    panels = {}
    for title, parts in _PANELS.items():
        curves = {name: _curve(lines[event], "step", number) for name, (event, number) in parts.items()}
        if curves := {name: curve for name, curve in curves.items() if curve[0]}:
            panels[title] = curves
    if not panels:
        return []
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure((3.3 * columns, 0.4 + 2.3 * rows))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        _plot(axis, curves)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        if title in _FROM_ZERO:
            axis.set_ylim(0, max(1e-3, 1.05 * max(max(values) for _, values in curves.values())))
        if len(curves) > 1:
            axis.legend(fontsize=8)
    for i, axis in enumerate(axes):
        axis.set_visible(i < len(panels))
        if i < len(panels) <= i + columns:  # the lowest of its column
            axis.tick_params(labelbottom=True)
            axis.set_xlabel("iteration (optimizer steps)", fontsize=8)
    return [save_figure(figure, folder / PLOTS / "training.png")]


def new_figure(size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: it keeps every figure in a global list

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, durable=False) as partial:
            figure.savefig(partial, dpi=120, format="png")
    except OSError as error:
        raise RunFolderError(f"{path}: not written: {error.strerror or error}") from None
    return path


def _plot(axis: Axes, curves: Mapping[str, Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name, (steps, values) in curves.items():
        marker = "o" if len(steps) <= _MAX_MARKERS else None
        style = "--" if name == "negatives" else "-"  # often on top of the positives' curve
        axis.plot(steps, values, style, label=name, color=_COLORS[name], marker=marker, markersize=3, linewidth=1.3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)


def _label(axis: Axes, number: str, title: str, kept: int | None) -> None:
    units = {"loss": "loss (mean over images)", "accuracy": "accuracy (fraction)"}
    axis.set(xlabel="iteration (optimizer steps)", ylabel=units[number], title=f"{title}: {number}")
    if number == "accuracy":
        low, _ = axis.get_ylim()
        axis.set_ylim(min(low, 1.0), 1.0 + 0.02)
    if kept is not None:
        axis.axvline(kept, color="0.4", linestyle=":", linewidth=1, label=f"kept: iteration {kept:,}")
    axis.legend()
