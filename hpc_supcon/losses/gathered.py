"""The rows of a loss as its backends see them: unit length, sorted by class, beside the columns of all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..distributed import collectives
from .validation import Anchors, Queue

# Rows whose largest entry is below this count as zero: their direction is rounding noise.
_ZERO_ROW = 1e-30
_PIECE = 8192
# The class of queue columns without labels: equal to no anchor's label, so they are negatives only.
NO_CLASS = torch.iinfo(torch.int64).min


class _UnitRows(torch.autograd.Function):
    """u = scale * x / |x|, rows taken in `order`; saves u alone, where autograd would keep four copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor:
        rows = (x if order is None else x.index_select(0, order)).to(dtype)
        # Divide by the largest entry first: squaring rows of 1e30, or of 1e-30, leaves the range of fp32.
        largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=1, keepdim=True)
        largest = torch.where(largest > _ZERO_ROW, largest, 1.0)
        u = rows / largest
        length = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        length = torch.where(length > 0, length, 1.0)
        u.mul_(scale / length)
        ctx.save_for_backward(u, scale, 1.0 / length / largest, order)
        ctx.dtype = x.dtype
        return u

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        u, scale, inverse_length, order = ctx.saved_tensors
        grad = torch.empty_like(u)
        # Only for a learned temperature: otherwise `scale` is on the CPU, and its gradient a wait for the device.
        grad_scale = torch.zeros_like(scale) if ctx.needs_input_grad[2] else None
        # By pieces: whole temporaries would double the memory of the backward pass at large N.
        for start in range(0, u.shape[0], _PIECE):
            piece = slice(start, start + _PIECE)
            g = grads[0][piece]
            radial = (g * u[piece]).sum(1, keepdim=True)
            if grad_scale is not None:
                grad_scale += (radial.sum() / scale).to(scale)
            part = torch.addcmul(g, u[piece], radial / -(scale * scale)).mul_(inverse_length[piece] * scale)
            if order is None:
                grad[piece] = part
            else:
                grad.index_copy_(0, order[piece], part)
        return grad.to(ctx.dtype), None, grad_scale, None


def unit_rows(x: Tensor, scale: Tensor, dtype: torch.dtype, order: Tensor | None = None) -> Tensor:
    """Rows of x [n, D] at length `scale` (a 0-dim tensor, differentiable), in `order`, as `dtype`.

    Idempotent up to `scale`. A zero row stays zero and receives a finite gradient.
    """
    unit: Tensor = _UnitRows.apply(x, order, scale, dtype)
    return unit


@dataclass(frozen=True)
class Columns:
    """What the anchors of one rank are compared with.

    u [M, D]: rows of all ranks in rank order, then the queue; ids [M] int64: equal where the labels are;
    sorted within each of `blocks` (start, stop). The rank's own rows are u[own], `own` = slice(offset,
    offset + n). n_pos, n_neg [n]: sizes of P(i) and N(i), float64. `rows_per_rank` as in Anchors.
    """

    u: Tensor
    ids: Tensor
    blocks: list[tuple[int, int]]
    own: slice
    n_pos: Tensor
    n_neg: Tensor
    rows_per_rank: list[int]


def sorted_columns(
    anchors: Anchors, queue: Queue | None, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Columns, Tensor]:
    """u [n, D] of the own rows, differentiable; all columns, gathered without gradient; the order of the own rows.

    The rows of u are anchors.rows[order], sorted by label: positives then fill few tiles, and the others
    need no comparison of labels.
    """
    labels, order = anchors.labels.sort(stable=True)
    u = unit_rows(anchors.rows, scale, dtype, order)
    return u, _gather(u, labels, anchors, queue, scale), order


def _gather(u: Tensor, labels: Tensor, anchors: Anchors, queue: Queue | None, scale: Tensor) -> Columns:
    rows = anchors.rows_per_rank
    spans_ranks = len(rows) > 1
    every_u = collectives.gather_rows(u, rows) if spans_ranks else u.detach()
    every_label = collectives.gather_rows(labels, rows) if spans_ranks else labels
    if queue is not None:
        past, past_labels = queue_columns(queue, scale, u.dtype)
        past_labels, order = past_labels.sort()
        every_u = torch.cat([every_u, past.index_select(0, order)])
        every_label = torch.cat([every_label, past_labels])
    ids = dense_ids(every_label)
    own = slice(anchors.offset, anchors.offset + u.shape[0])
    n_pos, n_neg = set_sizes(ids, own)
    edges = [sum(rows[:r]) for r in range(len(rows) + 1)] + ([every_u.shape[0]] if queue is not None else [])
    blocks = [(a, b) for a, b in pairwise(edges) if b > a]
    return Columns(every_u, ids, blocks, own, n_pos, n_neg, rows)


def queue_columns(queue: Queue, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Past embeddings as columns: normalized, without gradient; without labels they are negatives."""
    past, labels = queue
    u = unit_rows(past.detach(), scale.detach(), dtype)
    if labels is None:
        labels = torch.full((past.shape[0],), NO_CLASS, device=past.device)
    return u, labels.to(past.device, torch.int64)


def dense_ids(labels: Tensor) -> Tensor:
    """0, 1, 2, ... in the order of the label values; no read from the device (torch.unique needs one)."""
    values, order = labels.sort()
    steps = torch.zeros_like(values)
    steps[1:] = values[1:] != values[:-1]
    return torch.empty_like(values).index_copy_(0, order, steps.cumsum(0))


def set_sizes(ids: Tensor, own: slice) -> tuple[Tensor, Tensor]:
    """|P(i)| and |N(i)| of the own rows, i itself excluded; float64."""
    members = torch.zeros(ids.shape[0], dtype=torch.float64, device=ids.device)
    members.index_add_(0, ids, torch.ones_like(members))
    same = members.index_select(0, ids[own])
    return same - 1, ids.shape[0] - same
