"""Maps of embeddings: points of many dimensions as points of two, by PCA, t-SNE and UMAP.

Pure functions of the points and a seed. Which images are points is chosen here, too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.sources.stratify import stratified_sample
from ..errors import MissingExtra

Array = npt.NDArray[Any]
Key = TypeVar("Key", bound=Hashable)

MIN_POINTS = 5
"""Fewer images make no map."""
TRUSTED_NEIGHBORS = 12
PER_CLASS = 20
"""Where there are more than 20 classes, a sample has as many of them as have room with so many images each."""
UMAP_NEIGHBORS = 15
SMALL = 3000
"""Up to so many points, t-SNE's forces are summed over a tree; beyond, interpolated on a grid (van der Maaten 2014,
Linderman et al. 2019): which one is faster."""
TILE = 1 << 25
"""Numbers that one temporary tensor holds at most."""


def sample_of(labels: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` ascending int64 indices, of every class in proportion to its size.

    Of more than 20 classes, only count / 20 (at least 20) evenly spaced ones are drawn from, so that a class is more
    than a point or two. labels: int64 [N]. A pure function.
    """
    classes = labels.unique()
    most = max(count // PER_CLASS, 20)
    indices = torch.arange(len(labels))
    if len(classes) > most:
        indices = torch.where(torch.isin(labels, classes[torch.arange(most) * len(classes) // most]))[0]
    if len(indices) <= count:
        return indices
    return indices[stratified_sample(labels[indices], count=count, seed=seed)]


class Points:
    """The points of one space. Their nearest neighbors and principal components are computed once for all maps."""

    def __init__(self, x: Tensor) -> None:
        """x: float [n, D], finite, n >= 5."""
        assert len(x) >= MIN_POINTS, x.shape
        x = x.detach().float().cpu()
        self.x = x - x.mean(dim=0)  # distances near zero lose no digits to a large mean
        self._index = torch.empty(len(x), 0, dtype=torch.int64)
        self._distances = torch.empty(len(x), 0)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def is_one(self) -> bool:
        """Whether all points are the same one, as those of a collapsed encoder."""
        return bool((self.x == self.x[:1]).all())

    def nearest(self, k: int) -> tuple[Array, Array]:
        """(indices int64, Euclidean distances float64), both [n, k], nearest first; exact; not the point itself."""
        if k > self._index.shape[1]:
            found = [self._distances_from(rows).topk(k, largest=False) for rows in self._tiles(len(self))]
            self._distances = torch.cat([part.values for part in found])
            self._index = torch.cat([part.indices for part in found])
        return self._index[:, :k].numpy(), self._distances[:, :k].double().numpy()

    @cached_property
    def components(self) -> tuple[Array, Array]:
        """(coordinates float64 [n, 2] along the first two principal components, their shares of the variance [2]).

        Zeros for a second component that one-dimensional points do not have.
        """
        from sklearn.decomposition import PCA

        n, width = self.x.shape
        solver = "full" if min(n, width) <= 64 else "arpack"
        pca = PCA(min(2, width), svd_solver=solver, random_state=0)
        coordinates = pca.fit_transform(self.x.double().numpy())
        missing = 2 - coordinates.shape[1]
        return np.pad(coordinates, ((0, 0), (0, missing))), np.pad(pca.explained_variance_ratio_, (0, missing))

    def trustworthiness(self, mapped: Array, k: int = TRUSTED_NEIGHBORS) -> float:
        """How far the k nearest points on the map are near in the space, too: 1 where all of them are; about 0.5 for
        a random map.

        mapped: [n, 2]. Venna and Kaski 2001, equation 1. k is lowered to (n - 1) / 2 where n is small.
        """
        n = len(self)
        k = min(k, (n - 1) // 2)
        neighbors = Points(torch.from_numpy(np.asarray(mapped, dtype=np.float32))).nearest(k)[0]
        total = 0
        for rows in self._tiles(n * k):
            distances = self._distances_from(rows)
            own = distances.gather(1, torch.from_numpy(neighbors[rows.start : rows.stop]))
            ranks = 1 + (distances[:, None, :] < own[:, :, None]).sum(dim=2)
            total += int((ranks - k).clamp(min=0).sum())
        return 1 - 2 * total / (n * k * (2 * n - 3 * k - 1))

    def _tiles(self, per_row: int) -> list[range]:
        rows = max(1, TILE // per_row)
        return [range(start, min(start + rows, len(self))) for start in range(0, len(self), rows)]

    def _distances_from(self, rows: range) -> Tensor:
        """float [len(rows), n]; a point's distance to itself is infinite."""
        distances = torch.cdist(self.x[rows.start : rows.stop], self.x)
        distances[torch.arange(len(rows)), torch.arange(rows.start, rows.stop)] = math.inf
        return distances


@dataclass(frozen=True)
class FitOptions:
    """What maps are fitted with."""

    seed: int
    """0 <= seed < 2^32."""
    perplexities: tuple[float, ...] = (30.0,)
    """Effective numbers of neighbors in t-SNE; several: scales that are averaged."""


def pca_map(points: Points, options: FitOptions) -> Array:
    """The first two principal components."""
    return points.components[0]


def tsne_map(points: Points, options: FitOptions) -> Array:
    """t-SNE (van der Maaten and Hinton 2008), started from PCA, at the settings of openTSNE (Poličar et al. 2024)."""
    import openTSNE
    from openTSNE.affinity import Multiscale, PerplexityBasedNN
    from openTSNE.initialization import rescale
    from openTSNE.nearest_neighbors import PrecomputedNeighbors

    n = len(points)
    scales = fitting_perplexities(options.perplexities, n)
    neighbors = PrecomputedNeighbors(*points.nearest(min(n - 1, math.ceil(3 * scales[-1]))))
    if len(scales) == 1:
        affinities = PerplexityBasedNN(perplexity=scales[0], knn_index=neighbors)
    else:
        affinities = Multiscale(perplexities=list(scales), knn_index=neighbors)
    # one thread: for maps of this size, more of them wait for each other longer than they compute
    tsne = openTSNE.TSNE(negative_gradient_method="bh" if n <= SMALL else "fft", random_state=options.seed)
    return np.asarray(tsne.fit(affinities=affinities, initialization=rescale(points.components[0])))


def umap_map(points: Points, options: FitOptions) -> Array:
    """UMAP (McInnes et al. 2018), started from PCA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it cannot do later with given neighbors, and of its own imports
        import umap

        k = min(UMAP_NEIGHBORS, len(points))  # it counts the point itself
        index, distances = points.nearest(k - 1)
        own = np.arange(len(points))[:, None]
        start = points.components[0]
        model = umap.UMAP(
            n_neighbors=k,
            init=(start / np.abs(start).max() * 10).astype(np.float32),
            random_state=options.seed,
            n_jobs=1,  # the only number with a result that can be repeated
            force_approximation_algorithm=True,  # "approximate" are those it would find; these are exact
            precomputed_knn=(
                np.hstack([own, index]),
                np.hstack([np.zeros_like(own, dtype=np.float32), distances.astype(np.float32)]),
                None,
            ),
        )
        return np.asarray(model.fit_transform(points.x.numpy()))


@dataclass(frozen=True)
class MapMethod:
    """One entry of METHODS."""

    title: str
    fit: Callable[[Points, FitOptions], Array]
    rotates: bool = True
    """Whether a rotated map says the same; principal components may only change their signs."""
    package: str | None = None
    """What must be installed for it."""
    install: str = ""


METHODS: dict[str, MapMethod] = {
    "pca": MapMethod("PCA", pca_map, rotates=False),
    "tsne": MapMethod("t-SNE", tsne_map, package="openTSNE", install="pip install openTSNE"),
    "umap": MapMethod("UMAP", umap_map, package="umap", install="pip install 'hpc-supcon[umap]'"),
}


def missing_packages(methods: Sequence[str]) -> dict[str, MissingExtra]:
    """The error for each of `methods` whose package is not installed."""
    specs = {name: METHODS[name] for name in methods}
    return {
        name: MissingExtra(f"report.methods: {name} needs the package {spec.package}: {spec.install}")
        for name, spec in specs.items()
        if spec.package is not None and find_spec(spec.package) is None
    }


def fitting_perplexities(perplexities: Sequence[float], n: int) -> tuple[float, ...]:
    """In ascending order, each lowered to (n - 1) / 3: a point must have three times as many neighbors."""
    return tuple(sorted({min(p, (n - 1) / 3) for p in perplexities}))


def fit_map(method: str, points: Points, options: FitOptions) -> Array:
    """The map of these points: float64 [n, 2], with mean zero. All zeros where all points are one."""
    if points.is_one:
        return np.zeros((len(points), 2))
    mapped = METHODS[method].fit(points, options).astype(np.float64)
    return mapped - mapped.mean(axis=0)


def fit_aligned(method: str, points: Mapping[Key, Points], reference: Key, options: FitOptions) -> dict[Key, Array]:
    """`fit_map` of each of `points`, which are of the same images, aligned with that of `reference`."""
    maps = {key: fit_map(method, own, options) for key, own in points.items()}
    rotate = METHODS[method].rotates
    return {key: align(mapped, maps[reference], rotate=rotate) for key, mapped in maps.items()}


def align(mapped: Array, reference: Array, *, rotate: bool) -> Array:
    """`mapped` [n, 2], turned and mirrored so that it is as near as possible to `reference`, of the same images.

    Both have mean zero. Distances on the map stay as they are. rotate: by any angle (the orthogonal Procrustes
    problem; Schönemann 1966); else only the signs of the coordinates change.
    """
    if not rotate:
        return mapped * np.where((mapped * reference).sum(axis=0) < 0, -1.0, 1.0)
    u, _, v = np.linalg.svd(mapped.T @ reference)
    return np.asarray(mapped @ (u @ v))
