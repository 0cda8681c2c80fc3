"""The input of the losses that compare images: checked, and the same errors raised on all ranks before gathering."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import collectives
from ..errors import LossInputError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Queue = tuple[Tensor, Tensor | None]
"""(Past embeddings [Q, D], their labels [Q]; labels None: negatives of every anchor)."""


@dataclass(frozen=True)
class Anchors:
    """The rows of this rank, one per image and view, and the numbers of rows of the other ranks.

    rows [N, D] as given (any length, any float dtype), labels [N] int64, `rows_per_rank` in rank order ([N] without
    a process group), `queue_rows` the largest number of queue rows of any rank. keys [N, D]: what rows of all ranks
    are compared with in place of each other, as given; None: with each other.
    """

    rows: Tensor
    labels: Tensor
    rows_per_rank: list[int]
    queue_rows: int
    keys: Tensor | None = None

    @property
    def offset(self) -> int:
        """Number of rows of all lower ranks: the global index of this rank's first row."""
        return sum(self.rows_per_rank[: collectives.rank()]) if len(self.rows_per_rank) > 1 else 0


def prepare_anchors(
    features: Tensor,
    labels: Tensor | None,
    *,
    gather: bool = True,
    validate: bool = True,
    queue: Queue | None = None,
    keys: Tensor | None = None,
    rows_per_rank: list[int] | None = None,
) -> Anchors:
    """Check the input, flatten the views, and number the images of all ranks where there are no labels.

    features [B, V, D] or [N, D]; labels [B] or [N] of an integer dtype. Without labels the positives of a row are the
    other views of its image, which needs [B, V, D] with V >= 2. `validate` checks for NaN and Inf, which waits for
    the device once; shapes and dtypes are always checked. Raises LossInputError, the same on all ranks.

    `rows_per_rank`: rows (images times views) of every rank, where the caller knows that all ranks give the same
    list, dtypes and feature dimensions are equal and queues equally long. Then ranks exchange no message here and
    wait for no device; an error is raised on this rank alone.
    """
    spans_ranks = gather and collectives.world_size() > 1
    error = _find_error(features, labels, queue, keys, validate)
    if spans_ranks and rows_per_rank is None:
        counts = _exchange_counts(features, queue, error)
    else:
        if error is not None:
            raise error
        counts = [_counts(features, queue)]
        if spans_ranks and rows_per_rank is not None:
            counts = _counts_of_ranks(counts[0], rows_per_rank)
    images_before = sum(row[0] for row in counts[: collectives.rank()]) if spans_ranks else 0
    views = features.shape[1] if features.ndim == 3 else 1
    if labels is None:
        labels = torch.arange(features.shape[0], device=features.device) + images_before
    labels = labels.to(features.device, torch.int64)
    return Anchors(
        rows=features.flatten(0, 1) if features.ndim == 3 else features,
        labels=labels.repeat_interleave(views) if views > 1 else labels,
        rows_per_rank=[row[1] for row in counts],
        queue_rows=max(row[2] for row in counts),
        keys=None if keys is None else keys.flatten(0, -2),
    )


def prepare_views(
    embeddings: Tensor, images_per_rank: list[int] | None, *, validate: bool
) -> tuple[int, torch.dtype, int]:
    """Check [B, V, D], V >= 2, as `prepare_anchors` does without labels: (V, dtype, images of all ranks).

    dtype: what a loss computes in, fp32, or fp64 of fp64. images_per_rank: B of every rank, where all ranks know it.
    """
    views = embeddings.shape[1] if embeddings.ndim == 3 else 1
    rows_per_rank = None if images_per_rank is None else [n * views for n in images_per_rank]
    anchors = prepare_anchors(embeddings, None, validate=validate, rows_per_rank=rows_per_rank)
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    return views, dtype, sum(anchors.rows_per_rank) // views


def _counts(features: Tensor, queue: Queue | None) -> list[int]:
    """[images, rows, queue rows] of this rank."""
    rows = features.numel() // features.shape[-1]
    return [features.shape[0], rows, 0 if queue is None else queue[0].shape[0]]


def _counts_of_ranks(own: list[int], rows_per_rank: list[int]) -> list[list[int]]:
    """`_counts` of every rank, from the numbers of rows that the caller gave."""
    images, rows, queue_rows = own
    if len(rows_per_rank) != collectives.world_size() or rows_per_rank[collectives.rank()] != rows:
        raise LossInputError(
            f"rows_per_rank={rows_per_rank} is wrong: rank {collectives.rank()} of {collectives.world_size()} "
            f"has {rows} rows; leave it out where the ranks' batches differ"
        )
    views = rows // images if images else 1
    return [[n // views, n, queue_rows] for n in rows_per_rank]


def _find_error(
    features: Tensor, labels: Tensor | None, queue: Queue | None, keys: Tensor | None, validate: bool
) -> LossInputError | None:
    shape = tuple(features.shape)
    if features.ndim not in (2, 3) or shape[-1] == 0:
        return LossInputError(f"features must be [N, D] or [B, V, D] with D >= 1; got {list(shape)}")
    if features.dtype not in _FLOATS:
        return LossInputError(f"features must be floating point; got {features.dtype}")
    error = _find_label_error(features, labels)
    if error is None and queue is not None:
        error = _find_queue_error(features, queue)
    if error is None and keys is not None and (keys.shape != features.shape or keys.dtype not in _FLOATS):
        error = LossInputError(
            f"keys must be floating point of the shape of the features, {list(shape)}; "
            f"got {list(keys.shape)} {keys.dtype}"
        )
    if error is None and validate:
        values = {"features": features, "queue features": None if queue is None else queue[0], "keys": keys}
        found = [_find_non_finite(what, value.detach()) for what, value in values.items() if value is not None]
        error = next((one for one in found if one is not None), None)
    return error


def _find_label_error(features: Tensor, labels: Tensor | None) -> LossInputError | None:
    if labels is None:
        if features.ndim == 3 and features.shape[1] >= 2:
            return None
        return LossInputError(
            f"without labels an image's views are its positives: features must be [B, V, D] with V >= 2; "
            f"got {list(features.shape)}; give labels, or two views per image"
        )
    if labels.dtype not in _INTEGERS:
        return LossInputError(f"labels must be of an integer dtype; got {labels.dtype}")
    if labels.ndim != 1 or labels.shape[0] != features.shape[0]:
        return LossInputError(
            f"labels must be one per image, [{features.shape[0]}] for features {list(features.shape)}; "
            f"got {list(labels.shape)}"
        )
    return None


def _find_queue_error(features: Tensor, queue: Queue) -> LossInputError | None:
    past, labels = queue
    if past.ndim != 2 or past.shape[1] != features.shape[-1]:
        return LossInputError(
            f"queue features must be [Q, {features.shape[-1]}] like the features; got {list(past.shape)}"
        )
    if labels is not None and (labels.dtype not in _INTEGERS or labels.shape != past.shape[:1]):
        return LossInputError(
            f"queue labels must be [{past.shape[0]}] of an integer dtype; got {list(labels.shape)} {labels.dtype}"
        )
    return None


def _find_non_finite(what: str, values: Tensor) -> LossInputError | None:
    rows = values.reshape(-1, values.shape[-1])
    # The largest magnitude of a row is NaN or Inf exactly when one of its entries is; no copy of the rows.
    bad = ~torch.isfinite(torch.linalg.vector_norm(rows, ord=float("inf"), dim=1))
    if not bool(bad.any()):
        return None
    where = bad.nonzero().flatten().tolist()
    return LossInputError(f"{what} hold NaN or Inf in {len(where)} of {rows.shape[0]} rows, first in row {where[0]}")


def _exchange_counts(features: Tensor, queue: Queue | None, error: LossInputError | None) -> list[list[int]]:
    """`_counts` of every rank. Raises the same error on every rank where any rank has one.

    One small all_gather of fixed size comes first: a rank with wrong input must not let the others wait in a
    collective whose size depends on the input.
    """
    mine = [1, 0, 0, 0, 0, 0]
    if error is None:
        mine = [0, features.shape[-1], _FLOATS.index(features.dtype), *_counts(features, queue)]
    row = torch.tensor([mine], device=features.device)
    table = collectives.gather_rows(row, [1] * collectives.world_size()).tolist()
    if any(failed for failed, *_ in table):
        collectives.raise_on_all_ranks(error)
    for position, name in ((1, "feature dimension"), (2, "feature dtype")):
        values = [_FLOATS[row[2]] if position == 2 else row[1] for row in table]
        if len(set(values)) > 1:
            each = ", ".join(f"rank {r}: {value}" for r, value in enumerate(values))
            raise LossInputError(f"{name} differs between ranks: {each}")
    return [row[3:] for row in table]
