"""Detection of images of another data set by the features of a run's encoder: detectors and their scores.

A detector is fitted on the training features and gives each image a number that is larger the more the image looks
like one of other data. Images of the run's own test split are to be accepted, those of the other set to be found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.collectives import all_sum, gather_rows
from ..errors import CorruptSample, NonFinite
from ..losses.precision import float32_products
from .features import LabeledRows, in_chunks
from .probes.knn import nearest

ACCEPTED_PERCENT = 95
MIN_SHRINKAGE = 1e-6
"""Of the covariance: it can be inverted also where features never vary."""

Detector = Callable[[Tensor], Tensor]
"""This rank's features [n, D] -> [n] float: larger for images that look like other data."""


@torch.no_grad()
def ood_scores(own: Tensor, other: Tensor) -> dict[str, float]:
    """{"auroc", "fpr95"}, 0..1, of a detector's numbers on images of the run's data and of another set.

    own [n_r], other [m_r]: of this rank's images (a rank may have none). auroc: probability that an image of the
    other set has the larger number than one of the run's, ties counted half; 0.5 is chance. fpr95: share of the other
    set that is accepted at the lowest threshold that accepts at least 95 % of the run's images (number <= threshold);
    0 is best. Collective. Raises NonFinite.
    """
    from sklearn.metrics import roc_auc_score  # half a second to import

    own, other = (gather_rows(x).double().cpu() for x in (own, other))
    if not (own.isfinite().all() and other.isfinite().all()):
        raise NonFinite("NaN or Inf in what a detector of probe.ood computed: train again with a lower optim.lr")
    truth = torch.cat([torch.zeros(len(own)), torch.ones(len(other))]).numpy()
    accepted = -(-ACCEPTED_PERCENT * len(own) // 100)
    threshold = own.sort().values[accepted - 1]
    return {
        "auroc": float(roc_auc_score(truth, torch.cat([own, other]).numpy())),
        "fpr95": float((other <= threshold).double().mean()),
    }


@torch.no_grad()
def knn_detector(features: Tensor, k: int) -> Detector:
    """Distance to the k-th nearest training feature, unit rows (Sun et al. 2022, arXiv 2204.06507, section 3).

    features [n_r, D]: this rank's training rows. Collective; the detector is not. Raises CorruptSample where k is
    above the number of rows of all ranks.
    """
    bank = F.normalize(gather_rows(features), dim=1)
    if k > len(bank):
        raise CorruptSample(f"probe.knn.k={k} neighbors for probe.ood, but training has {len(bank)} images: lower it")

    def distances(x: Tensor) -> Tensor:
        with float32_products("fp32"):
            similarities = in_chunks(lambda rows: nearest(F.normalize(rows, dim=1), bank, k)[0][:, -1:], x)
        return (2 - 2 * similarities.double().squeeze(1)).clamp(min=0).sqrt()

    return distances


@torch.no_grad()
def mahalanobis_detector(rows: LabeledRows, classes: int) -> Detector:
    """Squared Mahalanobis distance to the nearest class mean (Lee et al. 2018, arXiv 1807.03888, eq. 1 and 2).

    rows: this rank's training features and labels. The covariance is shared by the classes, and shrunk towards a
    multiple of the identity by the share of Ledoit and Wolf (2004, lemma 3.2 to 3.4), at least MIN_SHRINKAGE, so that
    it can be inverted. In float64. Collective; the detector is not.
    """
    features, labels = rows
    x = features.double()
    members = F.one_hot(labels, classes).to(x)
    totals = all_sum(torch.cat([members.T @ x, members.sum(dim=0)[:, None]], dim=1))
    sums, counts = totals[:, :-1], totals[:, -1]
    means = sums / counts.clamp(min=1)[:, None]
    residuals = x - means[labels]
    n, width = counts.sum(), x.shape[1]
    scatter = all_sum(residuals.T @ residuals) / n
    fourth = all_sum(residuals.square().sum(dim=1).square().sum()) / n
    shared = scatter.trace() / width
    noise = (fourth - scatter.square().sum()) / n
    spread = scatter.square().sum() - width * shared.square()
    shrinkage = float(noise.clamp(min=0) / spread) if spread > noise else 1.0
    shrinkage = max(shrinkage, MIN_SHRINKAGE)
    variance = shared if shared > 0 else torch.ones_like(shared)  # all rows of a class are the same
    identity = torch.eye(width, dtype=x.dtype, device=x.device)
    factor = torch.linalg.cholesky((1 - shrinkage) * scatter + shrinkage * variance * identity)

    def whiten(points: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, points.double().T, upper=False).T

    centers = whiten(means[counts > 0])

    def distances(points: Tensor) -> Tensor:
        return in_chunks(lambda chunk: torch.cdist(whiten(chunk), centers).min(dim=1, keepdim=True).values, points)

    return lambda points: distances(points).squeeze(1).square()


def max_softmax_scores(logits: Tensor) -> Tensor:
    """log((1 - p) / p) of the largest softmax probability p of a classifier, [n, classes > 1] -> [n] (Hendrycks and
    Gimpel 2017, arXiv 1610.02136). It orders images as 1 - p does, also where p rounds to 1."""
    largest, found = logits.double().max(dim=1, keepdim=True)
    others = logits.double().scatter(1, found, -torch.inf)
    return (others - largest).logsumexp(dim=1)


def flat(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """{"DETECTOR_SCORE": number}, for a line of metrics.jsonl."""
    return {f"{name}_{key}": scores[name][key] for name in scores for key in ("auroc", "fpr95")}
