"""The probe `knn`: the k nearest neighbors by cosine similarity vote, with weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Splits
from ...distributed.collectives import all_sum, gather_rows
from ...errors import ConfigError, CorruptSample
from ..features import in_chunks
from .base import FittedProbe, ProbeOutcome, ProbeSpec, ProbeTask

TILE = 8192
"""Training rows compared at once: 32 MiB of similarities for 1024 queries."""


class NearestNeighbors(nn.Module):
    """[n, D] -> log of each class's votes [n, classes]: their softmax is each class's share of the votes.

    The k training rows with the largest cosine similarity vote for their class with exp(similarity / temperature)
    (Wu et al. 2018, arXiv 1805.01978, section 3.4). Ties in similarity go to the earlier rows.
    """

    bank: Tensor
    labels: Tensor

    def __init__(self, in_dim: int, classes: int, *, rows: int, k: int, temperature: float) -> None:
        """Room for `rows` training rows, which `fill` provides; 1 <= k <= rows."""
        assert 1 <= k <= rows
        super().__init__()
        self.classes, self.k, self.temperature = classes, k, temperature
        self.register_buffer("bank", torch.zeros(rows, in_dim))
        self.register_buffer("labels", torch.zeros(rows, dtype=torch.int64))

    def fill(self, features: Tensor, labels: Tensor) -> NearestNeighbors:
        """features float [rows, D], not necessarily normalized; labels int64 [rows]."""
        self.bank, self.labels = F.normalize(features, dim=1), labels
        return self

    def forward(self, features: Tensor) -> Tensor:
        return self._votes(*nearest(F.normalize(features, dim=1), self.bank, self.k))

    def leave_one_out(self, features: Tensor, own: Tensor) -> Tensor:
        """As `forward`, of features that are rows `own` int64 [n] of the bank, each without itself among its
        neighbors."""
        similarities, rows = nearest(F.normalize(features, dim=1), self.bank, self.k + 1)
        # own rows go last; where one is not found, because as many equal rows come before it, the last one goes
        order = (rows == own[:, None]).to(torch.uint8).sort(dim=1, stable=True).indices
        order = order[:, : min(self.k, rows.shape[1] - 1)]
        return self._votes(similarities.gather(1, order), rows.gather(1, order))

    def _votes(self, similarities: Tensor, rows: Tensor) -> Tensor:
        """Log of each class's votes [n, classes] by neighbors [n, k], of which the first is the most similar."""
        # relative to the largest one: exp(1 / temperature) overflows at small temperatures, and shares stay the same
        weights = ((similarities - similarities[:, :1]) / self.temperature).exp()
        votes = weights.new_zeros(len(rows), self.classes).scatter_add_(1, self.labels[rows], weights)
        return votes.clamp(min=torch.finfo(votes.dtype).tiny).log()


def nearest(queries: Tensor, bank: Tensor, k: int, *, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """(similarities, rows of the bank), both [n, k]: the k largest dot products, largest first, ties by row.

    Never stores more than n x tile similarities.
    """
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), tile):
        values, found = _top(queries @ bank[start : start + tile].T, k)
        best, rows = torch.cat([best, values], dim=1), torch.cat([rows, found + start], dim=1)
        # equal similarities are in ascending order of rows, and a stable sort keeps that order
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, rows = best[:, :k], rows.gather(1, order)[:, :k]
    return best, rows


def _top(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, in ascending order of columns; ties go to the first columns."""
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
    """Fraction (0..1) of `features` whose class the nearest neighbors predict, over all ranks. Collective.

    train_features [m_r, D] with train_labels [m_r], features [n_r, D] with labels [n_r]: this rank's shares,
    of any size; k >= 1. Raises CorruptSample where k is above the number of training rows of all ranks.
    """
    bank, bank_labels = gather_rows(train_features), gather_rows(train_labels)
    check_neighbors("validation.probe.k", k, len(bank))
    head = NearestNeighbors(bank.shape[1], classes, rows=len(bank), k=k, temperature=temperature).to(bank)
    head.fill(bank, bank_labels)
    correct = (in_chunks(head, features).argmax(dim=1) == labels).sum()
    correct, n = all_sum(torch.stack([correct, correct.new_tensor(len(labels))])).tolist()
    return correct / n


def check_neighbors(setting: str, k: int, rows: int) -> None:
    """Raise CorruptSample for more neighbors than images of the training split decode."""
    if k > rows:
        raise CorruptSample(
            f"{setting}={k} neighbors, but only {rows} training images decode: lower it, or mend the images"
        )


def _check(section: str, settings: Any, splits: Splits) -> None:
    if settings.k > len(splits.train):
        raise ConfigError(
            f"{section}.k={settings.k} neighbors, but the training split has {len(splits.train)} images"
        )


def _fit(task: ProbeTask) -> ProbeOutcome:
    """Trains nothing: stores the training rows."""
    settings = task.settings
    train = task.rows.gathered("train", task.input)
    assert train is not None
    check_neighbors(f"probe.{task.kind}.k", settings.k, len(train[0]))
    in_dim = train[0][0].numel()
    options: dict[str, Any] = {"rows": len(train[0]), "k": settings.k, "temperature": settings.temperature}
    description = task.describe(in_dim, {"name": "knn", "options": options}, classes=task.classes)
    head = NearestNeighbors(in_dim, len(task.classes), **options)
    fitted = FittedProbe(description, head=head).to(task.runtime.device)
    head.fill(in_chunks(fitted.prepare, train[0]), train[1])
    chosen = {"k": settings.k, "temperature": settings.temperature}
    return ProbeOutcome(fitted.eval(), chosen, facts={"iterations": None})


def _training_logits(fitted: FittedProbe, x: Tensor, rows: Tensor) -> Tensor:
    """Each training row is left out of its own neighbors: else it would be the nearest one of all."""
    bank: Any = fitted.head
    numbers = torch.arange(len(x), device=x.device)
    return in_chunks(lambda i: bank.leave_one_out(fitted.prepare(x[i]), rows[i]), numbers)


KNN = ProbeSpec(_check, _fit, NearestNeighbors, _training_logits)
