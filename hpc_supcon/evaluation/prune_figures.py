"""Figures of pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plots import PLOTS, new_figure, save_figure

if TYPE_CHECKING:
    from ..pruning import Sensitivity


def draw_sensitivity(path: Path, scan: Sensitivity, loss: str, sizes: Mapping[str, int]) -> Path:
    """A heat map at `path`: by layer and rate, the loss on validation with this layer pruned minus that of the dense
    encoder. sizes: number of weights of each layer. Raises RunFolderError."""
    import numpy as np

    names = list(scan.losses)
    added = np.array([scan.losses[name] for name in names]) - scan.dense
    finite = added[np.isfinite(added)]
    limit = float(np.abs(finite).max()) if finite.size and np.abs(finite).max() > 0 else 1.0
    figure = new_figure((3.6 + 0.62 * len(scan.rates), 1.3 + 0.27 * len(names)))
    axis = figure.add_subplot()
    shown = axis.imshow(np.ma.masked_invalid(added), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axis.set_facecolor("0.7")
    axis.set_xticks(range(len(scan.rates)), [f"{rate:g}" for rate in scan.rates])
    axis.set_yticks(range(len(names)), [f"{name.removesuffix('.weight')}  {sizes[name]:,}" for name in names])
    axis.tick_params(labelsize=8)
    for row, column in np.ndindex(added.shape):
        value = added[row, column]
        text, color = f"{value:+.2g}", "white" if 0.6 * limit < abs(value) <= limit else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color, parse_math=False)
    axis.set_xlabel("share of the layer's weights pruned", fontsize=9)
    axis.set_ylabel("layer, number of weights", fontsize=9)
    axis.set_title(f"{loss} on validation, minus {scan.dense:.4g} (nothing pruned)", fontsize=9, parse_math=False)
    figure.colorbar(shown, ax=axis, label="added loss", shrink=0.8)
    return save_figure(figure, path)


def draw_pruning(folder: Path, results: Sequence[Mapping[str, Any]], checkpoint: str) -> Path | None:
    """plots/pruning.png: a panel for each probe, accuracy on test against the share of pruned weights, a line for
    each way of pruning, and the accuracy before; None where no pruning of the checkpoint was evaluated.

    results: entries of results.json; checkpoint: the one that was pruned. Raises RunFolderError.
    """
    import matplotlib as mpl

    lines: dict[str, dict[str, dict[float, float]]] = {}
    before: dict[str, float] = {}
    for entry in results:
        if not entry.get("test"):
            continue
        accuracy, about = entry["test"]["accuracy"], entry.get("prune")
        if about is None and entry.get("checkpoint") == checkpoint:
            before[entry["probe"]] = accuracy
        elif about is not None and about["dense_checkpoint"] == checkpoint:
            line = lines.setdefault(entry["probe"], {}).setdefault(way_of(about), {})
            # removed channels leave no zeros
            share = about["rate"] if about["method"] == "channels" else about["zeros"] / about["weights"]
            line[share] = accuracy
    if not lines:
        return None
    names = list(dict.fromkeys(name for found in lines.values() for name in found))
    figure = new_figure((2.4 + 4.2 * len(lines), 3.6))
    with mpl.rc_context({"text.parse_math": False}):
        axes = figure.subplots(1, len(lines), squeeze=False, sharey=True)[0]
        for axis, (probe, found) in zip(axes, lines.items(), strict=True):
            if probe in before:
                axis.axhline(before[probe], color="0.4", linewidth=1, linestyle=":", label="not pruned")
            for name, points in found.items():
                style = {"color": f"C{names.index(name) % 10}", "marker": "osD^v"[names.index(name) // 10 % 5]}
                axis.plot([100 * x for x in sorted(points)], [points[x] for x in sorted(points)], label=name,
                          markersize=4, linewidth=1.4, **style)  # fmt: skip
            axis.set_title(f"{probe} probe", fontsize=9)
            axis.set_xlabel("weights (channels) pruned (%)", fontsize=9)
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
        axes[0].set_ylabel("test accuracy", fontsize=9)
        handles = {t: h for axis in axes for h, t in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False)
    return save_figure(figure, folder / PLOTS / "pruning.png")


def way_of(about: Mapping[str, Any]) -> str:
    """Of an entry's section `prune`: method, scope and what else is not the usual, such as "l1 2:4, fine-tuned"."""
    parts = [f"{about['method']} {about['scope']}"]
    parts += [about["schedule"]] if about.get("schedule") not in (None, "oneshot") else []
    parts += [f"rewind {about['rewind']}"] if about.get("rewind") else []
    parts += ["fine-tuned"] if about.get("finetune_steps") else []
    return ", ".join(parts + ([about["label"]] if about.get("label") else []))
