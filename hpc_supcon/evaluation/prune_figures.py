"""Figures of pruning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .plots import new_figure, save_figure

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
