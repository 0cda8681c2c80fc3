"""What a fitted probe makes of the splits: its logits on each, its scores and predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Source
from ..distributed.collectives import gather_sizes
from .features import evenly_spread, extract_indexed, in_chunks, rows_of_classes, select_classes
from .left_out import count_left_out
from .predictions import SPLITS, SplitPredictions, gather_predictions
from .probes import FittedProbe, ProbeTask, probe_spec
from .scores import gather_outcomes, split_scores

TRAINING_ROWS = 10_000
"""Of more training images than this, evenly spread ones stand for all in the training scores of kNN, whose cost would
grow with their square."""


@dataclass(frozen=True)
class ScoredProbe:
    """What a fitted probe makes of each split that the run has."""

    scores: dict[str, dict[str, Any]]
    """See scores.split_scores."""
    predictions: dict[str, SplitPredictions]
    left_out: dict[str, int]
    """Images that do not decode."""


def score_probe(task: ProbeTask, fitted: FittedProbe) -> ScoredProbe:
    """The scores of a probe on every split. Collective; the only place that reads the test split.

    Raises NonFinite.
    """
    scored = ScoredProbe({}, {}, {})
    for split in ("train", "validation", "test"):
        if getattr(task.data.splits, split) is None:
            continue
        logits, labels, index, scored.left_out[split] = _logits(task, fitted, split)
        outcomes = gather_outcomes(logits, labels, f"{fitted.kind} probe, {split} split")
        scored.scores[split] = split_scores(outcomes, fitted.classes, seed=task.config.seed)
        if split in SPLITS:
            scored.predictions[split] = gather_predictions(outcomes, logits, index)
    return scored


def _logits(task: ProbeTask, fitted: FittedProbe, split: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """(logits, labels, index in the split) of this rank's share, and the number of images that all ranks left out.
    Collective."""
    if fitted.input == "images":  # in batches: a split of large images may not fit into memory
        source: Source = getattr(task.data.splits, split)
        features, labels, index = extract_indexed(
            fitted.encoder,
            source,
            fitted.prepare,
            task.runtime,
            loader=task.data.loader,
            options=task.data.evaluation,
        )
        with torch.no_grad():
            return in_chunks(fitted.head, features), labels, index, count_left_out(source, labels)
    rows = task.rows.indexed(split, fitted.input)
    assert rows is not None
    x, labels, index = rows
    of_training_rows = probe_spec(fitted.kind).training_logits
    if split == "train" and of_training_rows is not None:
        sizes = gather_sizes(labels)
        numbers = sum(sizes[: task.runtime.rank]) + torch.arange(len(x), device=x.device)
        kept = evenly_spread(numbers, sum(sizes), TRAINING_ROWS)
        logits = of_training_rows(fitted, x[kept], numbers[kept])
        return logits, labels[kept], index[kept], task.rows.left_out[split]
    if fitted.classes != task.classes:
        chosen = [task.classes.index(name) for name in fitted.classes]
        index = index[rows_of_classes(labels, chosen)]
        x, labels = select_classes((x, labels), chosen)
    return fitted.logits(x), labels, index, task.rows.left_out[split]
