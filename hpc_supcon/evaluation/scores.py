"""Classification scores over all ranks, every sample counted once."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)


def classification_scores(predictions: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Fractions in 0..1: accuracy over samples; F1, precision, recall as macro averages over classes.

    predictions, labels: int64 [n_r], this rank's samples (none is allowed); torchmetrics sums the counts
    over ranks. Collective; the same on every rank.
    """
    scores = MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "f1": MulticlassF1Score(classes, average="macro"),
            "precision": MulticlassPrecision(classes, average="macro"),
            "recall": MulticlassRecall(classes, average="macro"),
        },
        compute_groups=False,  # with groups, ranks without samples would skip a synchronisation
    ).to(labels.device)
    if len(labels):
        scores.update(predictions, labels)
    else:
        scores.update(torch.zeros_like(labels), labels)
    return {name: float(value) for name, value in scores.compute().items()}
