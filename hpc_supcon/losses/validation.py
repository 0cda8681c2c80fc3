"""What a loss may be given: checked once, here, and agreed between the ranks before anything is gathered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import collectives
from ..errors import LossInputError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Queue = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Anchors:
    """One rank's rows, ready for a loss, and what it knows of the other ranks.

    rows [n, D] as given (any length, any float dtype), labels [n] int64, `rows_per_rank` in rank order
    ([n] without a process group), `queue_columns` the largest number of queue columns of any rank.
    """

    rows: Tensor
    labels: Tensor
    rows_per_rank: list[int]
    queue_columns: int

    @property
    def offset(self) -> int:
        """Number of rows of all lower ranks: the global index of this rank's first row."""
        return sum(self.rows_per_rank[: collectives.rank()]) if len(self.rows_per_rank) > 1 else 0


def prepare(
    features: Tensor,
    labels: Tensor | None,
    *,
    gather: bool = True,
    validate: bool = True,
    queue: Queue | None = None,
    rows_per_rank: list[int] | None = None,
) -> Anchors:
    """Flatten views, number the images where labels are missing, and check everything on every rank.

    features [B, V, D] or [N, D]; labels [B] or [N] of an integer dtype. Without labels the views of an
    image are its positives, which needs [B, V, D] with V >= 2. `validate` looks for NaN and Inf (one read
    from the device); shapes and dtypes are always checked. Raises LossInputError, the same on all ranks.

    `rows_per_rank`: rows (images times views) of every rank, where the caller knows that all ranks know the
    same, that dtype and feature dimension are equal and queues equally long. Then nothing is exchanged here and
    no number comes back from the device; an error is this rank's alone.
    """
    spans_ranks = gather and collectives.world_size() > 1
    error = _find_error(features, labels, queue, validate)
    if spans_ranks and rows_per_rank is None:
        counts = _agree(features, queue, error)
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
        queue_columns=max(row[2] for row in counts),
    )


def _counts(features: Tensor, queue: Queue | None) -> list[int]:
    """[images, rows, queue columns] of this rank."""
    rows = features.numel() // features.shape[-1]
    return [features.shape[0], rows, 0 if queue is None else queue[0].shape[0]]


def _counts_of_ranks(own: list[int], rows_per_rank: list[int]) -> list[list[int]]:
    """`_counts` of every rank, from the rows that the caller says they have."""
    images, rows, columns = own
    if len(rows_per_rank) != collectives.world_size() or rows_per_rank[collectives.rank()] != rows:
        raise LossInputError(
            f"rows_per_rank={rows_per_rank} is not true: rank {collectives.rank()} of {collectives.world_size()} "
            f"has {rows} rows; leave it out where the ranks' batches differ"
        )
    views = rows // images if images else 1
    return [[n // views, n, columns] for n in rows_per_rank]


def _find_error(
    features: Tensor, labels: Tensor | None, queue: Queue | None, validate: bool
) -> LossInputError | None:
    shape = tuple(features.shape)
    if features.ndim not in (2, 3) or shape[-1] == 0:
        return LossInputError(f"features must be [N, D] or [B, V, D] with D >= 1; got {list(shape)}")
    if features.dtype not in _FLOATS:
        return LossInputError(f"features must be floating point; got {features.dtype}")
    error = _find_label_error(features, labels)
    if error is None and queue is not None:
        error = _find_queue_error(features, queue)
    if error is None and validate:
        error = _find_non_finite("features", features.detach())
        if error is None and queue is not None:
            error = _find_non_finite("queue features", queue[0].detach())
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


def _agree(features: Tensor, queue: Queue | None, error: LossInputError | None) -> list[list[int]]:
    """[images, rows, queue columns] of every rank; or the same error on every rank.

    One small all_gather before anything of which the size depends on the input: a rank with bad input
    must not leave the others waiting in a larger collective.
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
