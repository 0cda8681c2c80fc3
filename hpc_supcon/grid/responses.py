"""Mean response of positives and of negatives against training steps, for the runs of a grid that logged them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RunFolderError
from ..files import atomic_path
from ..metric_file import METRICS, read_events
from ..pages.statistics import mean_and_interval
from .charts import COLORS
from .folder import FrozenGrid

FILE = "gradient-responses.png"
KINDS = {"response_positives": "positives", "response_negatives": "negatives"}
Interval = tuple[float, float]


@dataclass
class Responses:
    """Of the runs that differ only in their seed: kind -> step -> the value of each run."""

    label: str
    values: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {kind: {} for kind in KINDS})

    def curve(self, kind: str) -> tuple[list[int], list[Interval]]:
        """(steps, (mean over seeds, half width of its 95 % interval) of each), of the steps that all runs logged."""
        most = max(map(len, self.values[kind].values()), default=0)
        steps = sorted(step for step, values in self.values[kind].items() if len(values) == most)
        found = ((step, mean_and_interval(self.values[kind][step])) for step in steps)
        points = [(step, interval) for step, interval in found if interval is not None]
        return [step for step, _ in points], [interval for _, interval in points]


def responses_of(frozen: FrozenGrid) -> list[Responses]:
    """In the order of the cells, labeled by the axes that tell the groups apart. Raises RunFolderError for a log that
    cannot be read."""
    folders: dict[Path, dict[str, str]] = {}
    for cell in frozen.cells:  # cells that share a pre-training count once
        labels = {axis: label for axis, label in cell.labels.items() if axis != "seed"}
        folders.setdefault(frozen.run_folder(frozen.nodes[cell.nodes[0]]), labels)
    axes = dict.fromkeys(axis for labels in folders.values() for axis in labels)
    told = [axis for axis in axes if len({labels.get(axis) for labels in folders.values()}) > 1]
    groups: dict[str, Responses] = {}
    for folder, labels in folders.items():
        last = _last_values(_events(folder))
        if last:
            label = ", ".join(labels[axis] for axis in told if axis in labels) or frozen.name
            group = groups.setdefault(label, Responses(label))
            for (kind, step), value in last.items():
                group.values[kind].setdefault(step, []).append(value)
    return list(groups.values())


def _events(folder: Path) -> Iterable[dict[str, Any]]:
    try:
        return read_events(folder / METRICS)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunFolderError(f"{folder / METRICS}: cannot be read: {error.strerror}") from None


def _last_values(events: Iterable[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """(kind, step) -> value; of a step that was trained twice, the last."""
    return {
        (kind, event["step"]): float(event[kind])
        for event in events
        if event["event"] == "train"
        for kind in KINDS
        if event.get(kind) is not None
    }


def draw_responses(frozen: FrozenGrid, path: Path) -> bool:
    """A panel for positives and one for negatives, a line for each group with its 95 % interval over seeds; nothing,
    and False, where no run logged responses. Raises RunFolderError."""
    groups = responses_of(frozen)
    if not groups:
        return False
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # labels are the user's: "$" in them starts no formula
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        for axes, (kind, name) in zip(figure.subplots(1, len(KINDS)), KINDS.items(), strict=True):
            for number, group in enumerate(groups):
                steps, intervals = group.curve(kind)
                color = COLORS[number % len(COLORS)]
                axes.plot(steps, [mean for mean, _ in intervals], color=color, label=group.label, linewidth=1.5)
                low, high = ([mean + sign * half for mean, half in intervals] for sign in (-1, 1))
                axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
            axes.set(title=f"response of {name}", xlabel="iteration (optimizer steps)")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("mean over anchors")
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9
        )
        with atomic_path(path, durable=False) as partial:
            FigureCanvasAgg(figure).print_png(partial)
    return True
