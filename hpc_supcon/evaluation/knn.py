"""k nearest neighbors by cosine similarity, weighted votes, streamed over tiles of the training rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.collectives import all_sum, gather_rows
from .features import in_chunks

TILE = 8192
"""Training rows compared at once: with 1024 queries, 32 MiB of similarities."""


class Neighbors(nn.Module):
    """[n, D] -> log of each class's votes [n, classes]: softmax gives the shares of the votes.

    The k training rows most similar by cosine vote for their class with exp(similarity / temperature)
    (Wu et al. 2018, arXiv 1805.01978, section 3.4). Among equally similar rows the earlier ones count.
    """

    bank: Tensor
    labels: Tensor

    def __init__(self, in_dim: int, classes: int, *, rows: int, k: int, temperature: float) -> None:
        """Empty: `fill` gives it its `rows` training rows; 1 <= k <= rows."""
        assert 1 <= k <= rows
        super().__init__()
        self.classes, self.k, self.temperature = classes, k, temperature
        self.register_buffer("bank", torch.zeros(rows, in_dim))
        self.register_buffer("labels", torch.zeros(rows, dtype=torch.int64))

    def fill(self, features: Tensor, labels: Tensor) -> Neighbors:
        """features float [rows, D], of any length; labels int64 [rows]."""
        self.bank, self.labels = F.normalize(features, dim=1), labels
        return self

    def forward(self, features: Tensor) -> Tensor:
        similarities, rows = nearest(F.normalize(features, dim=1), self.bank, self.k)
        # over the greatest one: exp(1 / temperature) overflows at small temperatures, and shares stay the same
        weights = ((similarities - similarities[:, :1]) / self.temperature).exp()
        votes = weights.new_zeros(len(features), self.classes).scatter_add_(1, self.labels[rows], weights)
        return votes.clamp(min=torch.finfo(votes.dtype).tiny).log()


def nearest(queries: Tensor, bank: Tensor, k: int, *, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """(similarities, rows of the bank), both [n, k]: the k largest dot products, largest first, the earlier row
    first where they are equal. Never holds more than n x tile of them."""
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), tile):
        values, found = _top(queries @ bank[start : start + tile].T, k)
        best, rows = torch.cat([best, values], dim=1), torch.cat([rows, found + start], dim=1)
        # columns are in ascending order of rows where similarities are equal, and the stable sort keeps that
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, rows = best[:, :k], rows.gather(1, order)[:, :k]
    return best, rows


def _top(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row with their columns, in ascending order of columns; of equal ones the first."""
    k = min(k, similarities.shape[1])
    values, columns = similarities.topk(k, dim=1)
    # topk takes any of those equal to the k-th
    tied = (similarities >= values[:, -1:]).sum(dim=1) > k
    if tied.any():
        columns[tied] = similarities[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    columns = columns.sort(dim=1).values
    return similarities.gather(1, columns), columns


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    k: int,
    temperature: float,
) -> float:
    """Fraction (0..1) of `features` that their neighbors name rightly, over all ranks. Collective.

    train_features [m_r, D] with train_labels [m_r], features [n_r, D] with labels [n_r]: this rank's shares,
    of any size; 1 <= k <= the number of training rows of all ranks.
    """
    bank, bank_labels = gather_rows(train_features), gather_rows(train_labels)
    head = Neighbors(bank.shape[1], classes, rows=len(bank), k=k, temperature=temperature).to(bank)
    head.fill(bank, bank_labels)
    right = (in_chunks(head, features).argmax(dim=1) == labels).sum()
    right, n = all_sum(torch.stack([right, right.new_tensor(len(labels))])).tolist()
    return right / n
