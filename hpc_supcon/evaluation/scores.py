"""Classification scores over the samples of all ranks, each counted once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.collectives import all_sum
from ..errors import DataError


def classification_scores(predictions: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Fractions in 0..1: accuracy over samples; F1, precision, recall as macro averages over classes.

    predictions, labels: int64 [n_r], this rank's samples (a rank may have none). The averages go over the classes
    that have samples, as scikit-learn's with these as `labels` and zero_division=0; where others have none, they are
    listed as "absent". From counts, which are exact, in float64: equal on every rank and any number of ranks.
    Collective. Raises DataError without any sample.
    """
    hits = labels[predictions == labels]
    # on the CPU: counting on CUDA is not deterministic
    counts = torch.stack([torch.bincount(x.cpu(), minlength=len(classes)) for x in (hits, predictions, labels)])
    hits, predicted, actual = all_sum(counts.to(labels.device)).cpu()
    present = actual > 0
    if not present.any():
        raise DataError("there is no image to compute scores of")
    absent = [name for name, there in zip(classes, present.tolist(), strict=True) if not there]
    found = hits[present].double()
    precision = found / predicted[present].clamp(min=1)
    scores: dict[str, Any] = {
        "accuracy": int(hits.sum()) / int(actual.sum()),
        "f1": float((2 * found / (predicted + actual)[present]).mean()),
        "precision": float(precision.mean()),
        "recall": float((found / actual[present]).mean()),
    }
    return {**scores, "absent": absent} if absent else scores
