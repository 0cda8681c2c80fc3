"""Classification scores over the samples of all ranks, each counted once."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from ..distributed.collectives import gather_rows


def classification_scores(predictions: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Fractions in 0..1: accuracy over samples; F1, precision, recall as macro averages over classes.

    predictions, labels: int64 [n_r], this rank's samples (a rank may have none). They are gathered, two numbers per
    sample, so every rank returns the same scores. Collective.
    """
    predictions, labels = gather_rows(predictions), gather_rows(labels)
    scores = {
        "accuracy": multiclass_accuracy(predictions, labels, classes, average="micro"),
        "f1": multiclass_f1_score(predictions, labels, classes, average="macro"),
        "precision": multiclass_precision(predictions, labels, classes, average="macro"),
        "recall": multiclass_recall(predictions, labels, classes, average="macro"),
    }
    return {name: float(value) for name, value in scores.items()}
