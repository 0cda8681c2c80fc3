"""Classification scores over the samples of all ranks, each counted once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..distributed.collectives import all_sum, gather_rows_of
from ..errors import DataError, NonFinite
from ..seeding import stream

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BINS = 15
"""Bins of the expected calibration error."""
TOP = 5
RESAMPLES = 2000
PERCENTILES = (2.5, 97.5)
SMALLEST = float(np.finfo(np.float64).eps)
"""Probabilities below this count as this in the negative log likelihood, which is infinite for 0."""
_ROWS = 8192
"""Rows whose probabilities are computed at once in float64."""
_CELLS = 2**22
"""Numbers of resampled confusion matrices in memory at once."""


@dataclass(frozen=True)
class Outcomes:
    """What scores need of each of n samples: equal on every rank, in the order of the ranks."""

    labels: Ints
    predictions: Ints
    """The most probable class; the first of equal ones."""
    places: Ints
    """How many classes come before the true one: those that are more probable, and earlier ones that are as probable.
    0 where the prediction is right."""
    confidence: Floats
    """Probability of the prediction."""
    nll: Floats
    """-log of the probability of the true class, at most -log(SMALLEST)."""


def gather_outcomes(logits: Tensor, labels: Tensor, what: str) -> Outcomes:
    """The outcomes of the samples of all ranks. Collective.

    logits: float [n_r, C], whose softmax is the probabilities; labels: int64 [n_r] in 0..C-1; of this rank, which may
    have none. what: text for errors, such as "linear probe, test split". Probabilities are computed in float64.
    Raises NonFinite on every rank where a logit of any rank is NaN or Inf, DataError without any sample.
    """
    bad = int(all_sum((~logits.isfinite()).any(dim=1).sum()))
    if bad:
        raise NonFinite(
            f"{what}: the logits of {bad} images are NaN or Inf, so there are no scores; the encoder's features or "
            "the probe's weights overflow: lower the learning rate, or evaluate another checkpoint"
        )
    pairs = zip(logits.split(_ROWS), labels.split(_ROWS), strict=True)
    parts = [_outcomes(*pair) for pair in pairs]
    # gathered one by one, not summed on each rank: sums of floats would depend on the number of ranks
    columns = gather_rows_of([torch.cat(column) for column in zip(*parts, strict=True)])
    found, predictions, places, confidence, nll = (column.cpu().numpy() for column in columns)
    if not len(found):
        raise DataError("there is no image to compute scores of")
    return Outcomes(found, predictions, places, confidence, nll)


def _outcomes(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The fields of Outcomes, of some rows."""
    predictions = logits.argmax(dim=1)
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    log_p = logits.double().log_softmax(dim=1)
    nll = -log_p.gather(1, labels[:, None])[:, 0].clamp(min=math.log(SMALLEST))
    return labels, predictions, before.sum(dim=1), log_p.amax(dim=1).exp(), nll


def split_scores(outcomes: Outcomes, classes: Sequence[str], *, seed: int) -> dict[str, Any]:
    """Every score of one split, as plain data: `probes.KIND.splits.SPLIT` of scores.json.

    samples; accuracy and top5 (only for more than 5 classes) over samples; balanced_accuracy, f1, precision, recall:
    means over the classes that have samples; f1_weighted, precision_weighted, recall_weighted: means over samples of
    the score of their class; accuracy_interval, f1_interval: see `bootstrap_intervals`; ece, nll; per_class, where a
    class that is never there or never predicted has 0 (scikit-learn's zero_division=0); confusion: samples, rows are
    true classes. All but samples and nll are in 0..1.
    """
    confusion = count_confusion(outcomes.predictions, outcomes.labels, len(classes))
    actual, per_class = confusion.sum(axis=1), _per_class(confusion)
    accuracy_interval, f1_interval = bootstrap_intervals(confusion, seed=seed)
    n = len(outcomes.labels)
    scores = headline(confusion)
    top5 = {"top5": int((outcomes.places < TOP).sum()) / n} if len(classes) > TOP else {}
    return {
        "samples": n,
        "accuracy": scores["accuracy"],
        "accuracy_interval": accuracy_interval,
        **top5,
        "balanced_accuracy": scores["recall"],  # by definition the macro average of recall
        "f1": scores["f1"],
        "f1_interval": f1_interval,
        "precision": scores["precision"],
        "recall": scores["recall"],
        **{f"{name}_weighted": float((actual * values).sum() / n) for name, values in per_class.items()},
        "ece": calibration_error(outcomes.confidence, outcomes.predictions == outcomes.labels),
        "nll": math.fsum(outcomes.nll) / n,
        "per_class": {**{name: values.tolist() for name, values in per_class.items()}, "samples": actual.tolist()},
        "confusion": confusion.tolist(),
    }


def headline_entry(scores: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """The scores of a split as results.json has them: accuracy, f1, precision, recall and, where some classes have no
    samples in it, the names of these as "absent"."""
    absent = [name for name, n in zip(classes, scores["per_class"]["samples"], strict=True) if n == 0]
    numbers = {name: scores[name] for name in ("accuracy", "f1", "precision", "recall")}
    return {**numbers, "absent": absent} if absent else numbers


def headline(confusion: Ints) -> dict[str, float]:
    """accuracy over samples; f1, precision, recall as macro averages over the classes that have samples, as
    scikit-learn's with these as `labels` and zero_division=0. confusion: int64 [C, C], rows are true classes."""
    present = confusion.sum(axis=1) > 0
    means = {name: float(values[present].mean()) for name, values in _per_class(confusion).items()}
    return {"accuracy": int(confusion.trace()) / int(confusion.sum()), **means}


def count_confusion(predictions: Ints, labels: Ints, classes: int) -> Ints:
    """int64 [C, C]: samples of each true class (row) with each prediction (column)."""
    counts = np.bincount(labels * classes + predictions, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)


def _per_class(confusion: Ints) -> dict[str, Floats]:
    """f1, precision, recall, float64 [C] each, 0 where they are not defined."""
    hits, predicted, actual = confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)
    return {
        "f1": _f1(hits, predicted, actual),
        "precision": hits / predicted.clip(min=1),
        "recall": hits / actual.clip(min=1),
    }


def _f1(hits: Ints, predicted: Ints, actual: Ints) -> Floats:
    """2 hits / (predicted + actual), which is the harmonic mean of precision and recall; 0 for classes of neither."""
    return 2 * hits / (predicted + actual).clip(min=1)


def calibration_error(confidence: Floats, correct: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error: the mean over samples of |accuracy - mean confidence| of their bin.

    15 bins of equal width, (0, 1/15], ..., (14/15, 1] (Guo et al. 2017, arXiv 1706.04599, equation 3).
    """
    edges = np.arange(BINS + 1) / BINS
    # rounding may lift a probability above 1
    bins = np.searchsorted(edges, confidence.clip(max=1.0), side="left") - 1
    correct_in, confidence_in = (np.bincount(bins, weights=w, minlength=BINS) for w in (correct, confidence))
    return float(np.abs(correct_in - confidence_in).sum() / len(confidence))


def bootstrap_intervals(confusion: Ints, *, seed: int) -> tuple[list[float], list[float]]:
    """95 % percentile intervals [low, high] of accuracy and macro F1 (Efron and Tibshirani 1993, section 13.3).

    Each of RESAMPLES resamples draws as many images as there are, with replacement. Both scores depend on the images
    only through the cells of the confusion matrix, and each draw falls into a cell with that cell's share of the
    images, independently of the others: the cells of a resample are one draw of a multinomial distribution. Of the
    macro F1 of a resample, as of any split, the mean is over the classes that it has samples of. Where every image is
    right, both intervals are [1, 1]. Equal on every rank.
    """
    rows, columns = confusion.nonzero()  # sorted by row
    cells = confusion[rows, columns]
    n, classes = int(cells.sum()), len(confusion)
    generator = np.random.default_rng(stream(seed, "bootstrap"))
    accuracies, f1s = [], []
    size = max(1, _CELLS // max(len(cells), classes))
    for start in range(0, RESAMPLES, size):
        counts = generator.multinomial(n, cells / n, size=min(size, RESAMPLES - start))
        hits = _totals(counts * (rows == columns), rows, classes)
        predicted, actual = _totals(counts, columns, classes), _totals(counts, rows, classes)
        accuracies.append(hits.sum(axis=1) / n)
        # without samples of a class there are no hits either
        f1s.append(_f1(hits, predicted, actual).sum(axis=1) / (actual > 0).sum(axis=1))
    accuracy, f1 = (np.percentile(np.concatenate(x), PERCENTILES).tolist() for x in (accuracies, f1s))
    return accuracy, f1


def _totals(counts: Ints, groups: Ints, classes: int) -> Ints:
    """[B, classes]: sums of counts [B, cells] over the cells of each group int64 [cells]."""
    order = groups.argsort(kind="stable")
    found, starts = np.unique(groups[order], return_index=True)
    totals = np.zeros((len(counts), classes), dtype=np.int64)
    totals[:, found] = np.add.reduceat(counts[:, order], starts, axis=1)
    return totals
