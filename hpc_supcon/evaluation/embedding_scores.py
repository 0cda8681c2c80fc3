"""Scores of an embedding: how its classes lie in it, without a classifier. Exact, over the rows of all ranks.

No score needs a matrix of all pairs. The mean cosine distance of a row to a class is one minus its product with the
mean of the class's unit rows, so silhouette, alignment and distances within and between classes come from sums over
classes. Uniformity and retrieval compare each row with all others, a chunk of rows at a time. The chunks are shared
among the ranks, however many rows each of them has, and are the same for any number of ranks; so is every score.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.collectives import all_sum, gather_objects, gather_rows, gather_sizes, rank, world_size
from ..errors import NonFinite
from ..losses.diagnostics import effective_rank_of, squared_distances
from ..losses.precision import float32_products
from ..seeding import stream

RECALLS = (1, 5, 10)
RESTARTS, ITERATIONS = 5, 100
"""Of k-means: initializations, and the most iterations of each."""
ROUNDING = 1e-12
"""Cosine distances in float64 below this are rounding, and are taken as 0."""

_CHUNK, _CPU_PIECE = 512, 16
"""Rows compared with all others at once, and those of them that are ranked at once on a CPU, in its cache."""
_MOST_SIMILARITIES = 1 << 26
_COLUMNS = 64
_INDEX_BITS, _SIMILARITY_BITS = 24, 28

Scores = dict[str, float | int | None]


@torch.no_grad()
def embedding_scores(features: Tensor, labels: Tensor, *, seed: int) -> Scores:
    """Scores of float features [n_r, D] with labels int64 [n_r], this rank's rows (a rank may have none). Collective.

    Rows are scaled to unit length first, except for `effective_rank`; a row of zeros stays one, at cosine distance 1
    from every other. A score that is not defined for these rows is None. Classes without rows count nowhere.

    - alignment: mean of |z_i - z_j|^2 over the pairs of one class (Wang and Isola 2020, arXiv 2005.10242, alpha = 2),
      0..4. None where no class has two rows.
    - uniformity: log of the mean of exp(-2 |z_i - z_j|^2) over all pairs (the same, t = 2), -8..0. None for one row.
    - silhouette: mean silhouette coefficient with the cosine distance (Rousseeuw 1987), -1..1; a row that is alone in
      its class has 0. None for one class, and where every row has a class of its own.
    - intra_inter: mean cosine distance of the pairs of one class over that of the pairs of two classes, >= 0; smaller
      is better. None without pairs of either kind, and where the second mean is 0.
    - nmi, ari: normalized mutual information (arithmetic mean), 0..1, and adjusted Rand index, -1..1, of the classes
      and as many clusters of k-means (the best of `RESTARTS`). None for one class.
    - effective_rank: RankMe (Garrido et al. 2023, arXiv 2210.02885, eq. 1), of the rows as they are: exp of the
      entropy of the singular values' shares, 1..min(n, D). None where all rows are 0.
    - recall_at_K: share of the rows that have a row of their class among the K nearest others; r_precision: mean
      share of its class among the R nearest others, where R others are of its class; map_at_r: mean average precision
      at R (Musgrave et al. 2020, arXiv 2003.08505, section 3.2). By cosine similarity; equal ones (to 2^-28) go to
      earlier rows. Rows that are alone in their class have nothing to retrieve and are left out; None where all are.

    Raises NonFinite for NaN or Inf in the features.
    """
    sizes = gather_sizes(features)
    rows, labels = gather_rows(features, sizes), gather_rows(labels, sizes)
    bad = int((~torch.isfinite(rows)).any(dim=1).sum())
    if bad:
        raise NonFinite(
            f"NaN or Inf in the features of {bad} of {len(rows)} images: no scores of the embedding; set "
            "probe.embedding=false, or train again with a lower optim.lr"
        )
    with float32_products("fp32"):
        return {"samples": len(rows), **_Embedding(rows, labels).scores(seed)}


class _Embedding:
    """The unit rows of all ranks, and sums over their classes."""

    def __init__(self, rows: Tensor, labels: Tensor) -> None:
        assert len(rows) < 1 << _INDEX_BITS
        self.rows = rows
        self.unit = F.normalize(rows.double(), dim=1)
        self.single = self.unit.float()
        # filled up, so that no column takes another kernel: products with equal rows would differ in the last bit
        self.columns = F.pad(self.single, (0, 0, 0, -len(rows) % _COLUMNS))
        self.squares = self.unit.square().sum(dim=1)  # 1, or 0 of a row of zeros
        _, self.classes, sizes = labels.unique(return_inverse=True, return_counts=True)
        self.sizes = sizes.double()
        parts = self.unit[self.classes.argsort(stable=True)].split(sizes.tolist())
        self.sums = torch.stack([part.sum(dim=0) for part in parts]) if parts else self.unit[:0]
        self.others = (sizes - 1)[self.classes]  # rows of the same class besides the row itself
        self.most_others = self.others.tolist()

    def scores(self, seed: int) -> Scores:
        n, classes = len(self.unit), len(self.sizes)
        values = all_sum(self._of_own_chunks())
        retrieving = self.others > 0
        can_retrieve, several = bool(retrieving.any()), classes > 1
        silhouette, potential, *retrieved = values.T
        means = [float(column[retrieving].mean()) if can_retrieve else None for column in retrieved]
        nmi, ari = self._clustering(seed) if several else (None, None)
        return {
            **self._pair_means(),
            "uniformity": math.log(float(potential.sum()) / (n * (n - 1))) if n > 1 else None,
            "silhouette": float(silhouette.mean()) if several and classes < n else None,
            "nmi": nmi,
            "ari": ari,
            "effective_rank": self._effective_rank(),
            **dict(zip([*(f"recall_at_{k}" for k in RECALLS), "r_precision", "map_at_r"], means, strict=True)),
        }

    def _pair_means(self) -> Scores:
        """alignment and intra_inter, from sums of products over pairs of different rows."""
        n, own = len(self.unit), float(self.sums.square().sum())
        pairs = float((self.sizes * (self.sizes - 1)).sum())
        products = own - float(self.squares.sum())
        other_pairs = float(n * n - self.sizes.square().sum())
        other_products = float(self.sums.sum(dim=0).square().sum()) - own
        alignment = ratio = None
        if pairs:
            lengths = 2 * float((self.squares * self.others).sum())  # |z_i|^2 + |z_j|^2 over the pairs
            alignment = max(0.0, (lengths - 2 * products) / pairs)
            inter = 1 - other_products / other_pairs if other_pairs else 0.0
            ratio = max(0.0, 1 - products / pairs) / inter if inter > ROUNDING else None
        return {"alignment": alignment, "intra_inter": ratio}

    def _of_own_chunks(self) -> Tensor:
        """float64 [n, ...]: silhouette, sum of exp(-2 d^2) over the other rows, recalls, R-precision and average
        precision of each row in the chunks of this rank; 0 for all others, so that the sum over ranks is exact."""
        n = len(self.unit)
        values = self.unit.new_zeros(n, 4 + len(RECALLS))
        size = max(_CPU_PIECE, min(_CHUNK, _MOST_SIMILARITIES // max(1, n)))
        piece = size if self.unit.is_cuda else _CPU_PIECE
        for start in list(range(0, n, size))[rank() :: world_size()]:
            chunk = slice(start, min(start + size, n))
            values[chunk, 0] = self._silhouettes(chunk)
            similarities = (self.single[chunk] @ self.columns.T)[:, :n]
            for first in range(chunk.start, chunk.stop, piece):
                part = slice(first, min(first + piece, chunk.stop))
                own = similarities[part.start - start : part.stop - start]
                values[part, 1] = self._potentials(part, own)
                values[part, 2:] = self._retrieval(part, own)
        return values

    def _silhouettes(self, chunk: slice) -> Tensor:
        products = self.unit[chunk] @ self.sums.T
        own_class = self.classes[chunk, None]
        own = (self.sizes[own_class] - products.gather(1, own_class)).squeeze(1) - (1 - self.squares[chunk])
        a = own / self.others[chunk].clamp(min=1)
        means = (1 - products / self.sizes).scatter(1, own_class, math.inf)
        b = means.min(dim=1).values
        a, b = (torch.where(x > ROUNDING, x, 0.0) for x in (a, b))
        is_defined = (self.others[chunk] > 0) & (torch.maximum(a, b) > 0) & b.isfinite()
        return torch.where(is_defined, (b - a) / torch.maximum(a, b), 0.0)

    def _potentials(self, part: slice, similarities: Tensor) -> Tensor:
        squares = self.squares.float()
        potentials = squared_distances(similarities, squares[part], squares).mul_(-2).exp_()
        potentials.diagonal(part.start).zero_()
        return potentials.sum(dim=1, dtype=torch.float64)

    def _retrieval(self, part: slice, similarities: Tensor) -> Tensor:
        """[n, 5]: for each row of `part` its recalls, R-precision and average precision at R."""
        others = self.others[part, None]
        k = min(len(self.unit) - 1, max(*self.most_others[part], *RECALLS))
        if k == 0:
            return self.unit.new_zeros(len(others), 2 + len(RECALLS))
        nearest = _nearest_others(part.start, similarities, k)
        hits = self.classes[nearest] == self.classes[part, None]
        place = torch.arange(1, k + 1, device=hits.device)
        found = hits & (place <= others)
        precision = torch.where(found, hits.cumsum(dim=1) / place.double(), 0.0)
        totals = torch.stack([found.sum(dim=1).double(), precision.sum(dim=1)], dim=1) / others.clamp(min=1)
        recalls = torch.stack([hits[:, :k].any(dim=1) for k in RECALLS], dim=1)
        return torch.cat([recalls.double(), totals], dim=1)

    def _effective_rank(self) -> float | None:
        gram = self.unit.new_zeros(self.rows.shape[1], self.rows.shape[1])
        for chunk in self.rows.split(8192):
            wide = chunk.double()
            gram += wide.T @ wide
        return float(effective_rank_of(gram)) if float(gram.trace()) > 0 else None

    def _clustering(self, seed: int) -> tuple[float, float]:
        """(NMI, ARI) of the classes and the clusters of k-means; each rank does some of the restarts. Collective."""
        from sklearn.cluster import KMeans  # half a second to import
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        points, truth = self.unit.cpu().numpy(), self.classes.cpu().numpy()
        best: tuple[float, int, Any] = (math.inf, RESTARTS, np.zeros(len(points)))
        for restart in range(rank(), RESTARTS, world_size()):
            found = KMeans(
                len(self.sizes), n_init=1, max_iter=ITERATIONS, random_state=stream(seed, "clusters", restart) % 2**32
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than classes
                found.fit(points)
            best = min(best, (float(found.inertia_), restart, found.labels_), key=lambda fit: fit[:2])
        clusters = best[2]
        scores = (float(normalized_mutual_info_score(truth, clusters)), float(adjusted_rand_score(truth, clusters)))
        return min(gather_objects((*best[:2], scores)))[2]


def _nearest_others(first: int, similarities: Tensor, k: int) -> Tensor:
    """int64 [n, k]: for rows `first`, first + 1, ... the k others with the largest similarities [n, N] (-1..1),
    largest first, equal ones in ascending order; k < N. Similarities of rows with themselves are overwritten."""
    similarities.diagonal(first).fill_(-2)
    columns = similarities.shape[1]
    backwards = torch.arange(columns - 1, -1, -1, dtype=torch.float64, device=similarities.device)
    # one number for similarity and column, exact in 53 bits: all differ, so that any selection gives the same ones
    keys = similarities.double().mul_(2.0**_SIMILARITY_BITS).round_().mul_(2.0**_INDEX_BITS).add_(backwards)
    if keys.is_cuda:
        largest = keys.topk(k, dim=1).values
    else:  # several times as fast as topk for many neighbors
        partitioned = np.partition(keys.numpy(), columns - k, axis=1)[:, columns - k :]
        largest = torch.from_numpy(np.sort(partitioned, axis=1)[:, ::-1].copy())
    return columns - 1 - (largest.long() & ((1 << _INDEX_BITS) - 1))
