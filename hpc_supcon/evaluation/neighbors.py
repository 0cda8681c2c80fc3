"""The images that an encoder takes for most alike: the nearest neighbors of a few, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Source
from ..data.sources.stratify import indices_by_class, stratified_sample
from ..distributed.collectives import all_sum, gather_rows
from ..distributed.launch import Runtime
from ..errors import NonFinite
from .features import extract_indexed
from .map_figures import INK, shortened
from .probes.knn import nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAME, OTHER, DASHED = "#1b7837", "#c51b1b", (0, (2.5, 1.2))
"""Frames of neighbors of the query's class, and of others."""
PLAIN = "#717581"


@dataclass(frozen=True)
class Neighbors:
    """The neighbors of some images, in the order of the images' indices."""

    queries: Tensor
    """int64 [q]: indices in the source."""
    index: Tensor
    """int64 [q, k]: of the neighbors, nearest first."""
    similarities: Tensor
    """float [q, k]: cosine similarities, -1..1."""


def choose_queries(labels: Tensor, count: int, seed: int) -> Tensor:
    """Ascending positions in `labels` int64 [n]: of `count` images, of evenly spaced classes where there are more
    classes than that. A pure function; at most n."""
    count, members = min(count, len(labels)), indices_by_class(labels)
    if count > len(members):
        return stratified_sample(labels, count=count, seed=seed)
    rng = np.random.default_rng(seed)
    chosen = [members[i * len(members) // count] for i in range(count)]
    return torch.stack([rows[rng.integers(len(rows))] for rows in chosen]).sort().values


def find_neighbors(
    encoder: nn.Module,
    source: Source,
    queries: Tensor,
    transform: nn.Module,
    runtime: Runtime,
    *,
    k: int,
    **serving: Any,
) -> Neighbors:
    """The k images of `source` most similar to each of `queries` by the cosine of the encoder's features. Collective.

    queries: int64 indices in the source; a query is not its own neighbor. k is lowered to the number of other images.
    Queries that do not decode are left out. serving: loader and options, as of `extract`. Raises NonFinite.
    """
    features, _, index = extract_indexed(encoder, source, transform, runtime, **serving)
    check_finite(features, "features of the encoder")
    own = F.normalize(features, dim=1)
    is_query = torch.isin(index, queries.to(index.device))
    wanted, wanted_index = gather_rows(own[is_query]), gather_rows(index[is_query])
    similarities, rows = nearest(wanted, own, k + 1)  # one may be the query itself
    # candidates of all ranks, in ascending order of their indices where they are equally similar
    similarities = gather_rows(similarities.T.contiguous()).T
    candidates = gather_rows(index[rows].T.contiguous()).T
    similarities = similarities.masked_fill(candidates == wanted_index[:, None], -torch.inf)
    similarities, order = similarities.sort(dim=1, descending=True, stable=True)
    k = min(k, int(all_sum(index.new_tensor(len(index)))) - 1)
    candidates = candidates.gather(1, order)[:, :k]
    return Neighbors(wanted_index.cpu(), candidates.cpu(), similarities[:, :k].cpu())


def check_finite(features: Tensor, what: str) -> None:
    """Raise NonFinite, on all ranks, where a number of any rank's `features` [n_r, D] is NaN or Inf. Collective."""
    bad = (~features.isfinite().all(dim=1)).sum()
    bad, total = all_sum(torch.stack([bad, bad.new_tensor(len(features))])).tolist()
    if bad:
        raise NonFinite(
            f"{what}: NaN or Inf for {bad} of {total} images, so there are no distances between them; train with "
            "another seed, a lower optim.lr, or train.precision=fp32"
        )


def neighbors_figure(
    images: Mapping[int, Tensor], found: Neighbors, labels: Tensor, classes: Sequence[str], title: str
) -> Figure:
    """A row for each query: the query, then its neighbors, nearest first, with their similarities.

    images: uint8 [C, H, W] by index. labels: int64 [N], of the source. Neighbors of the query's class have a solid
    green frame; others a dashed red one, a cross, and their class's name. No classes: no labels, and plain frames.
    """
    from matplotlib.figure import Figure

    rows, columns = found.index.shape
    width, height, margin, header = 0.25 + 0.8 * (columns + 1), 0.92 * rows, 0.1, 0.55
    page = (width + 2 * margin, height + header + margin)
    figure = Figure(figsize=page)
    axis = figure.add_axes((margin / page[0], margin / page[1], width / page[0], height / page[1]))
    axis.set(xlim=(-0.03, width / 0.8), ylim=(height / 0.8, -0.03))
    axis.set_axis_off()
    for row, (query, neighbors) in enumerate(zip(found.queries.tolist(), found.index.tolist(), strict=True)):
        top, own = 1.15 * row, int(labels[query])
        _show(axis, images[query], 0, top, shortened(classes[own], 12) if classes else "query", INK, "-")
        for column, neighbor in enumerate(neighbors):
            if not classes:
                similarity = f"{found.similarities[row, column]:.2f}"
                _show(axis, images[neighbor], 1.3 + column, top, similarity, PLAIN, "-")
                continue
            name, same = shortened(classes[int(labels[neighbor])], 10), int(labels[neighbor]) == own
            below = f"{found.similarities[row, column]:.2f}" if same else f"× {name}"
            _show(axis, images[neighbor], 1.3 + column, top, below, SAME if same else OTHER, "-" if same else DASHED)
    figure.suptitle(title, fontsize=9, color=INK, y=1 - 0.1 / page[1], va="top")
    return figure


def _show(axis: Axes, image: Tensor, left: float, top: float, below: str, color: str, line: Any) -> None:
    """One image of a grid, in a frame, with a text below."""
    from matplotlib.patches import Rectangle

    pixels = image.permute(1, 2, 0).numpy()
    axis.imshow(
        pixels if pixels.shape[2] == 3 else pixels[:, :, 0],
        extent=(left, left + 0.94, top + 0.94, top),
        cmap="gray",
        vmin=0,
        vmax=255,
        aspect="auto",
        interpolation="nearest" if pixels.shape[0] < 64 else "antialiased",
    )
    axis.add_patch(Rectangle((left, top), 0.94, 0.94, fill=False, edgecolor=color, linewidth=1.8, linestyle=line))
    axis.text(left + 0.47, top + 0.98, below, ha="center", va="top", fontsize=6.5, color=color)
