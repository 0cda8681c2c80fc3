"""The rows that a rank's anchors are compared with: normalized, sorted by class, gathered from all ranks.

Shape suffixes in this package: N are the rows (anchors) of this rank, M the rows of all ranks followed by those of
the queue, D the feature dimensions; R and C are the rows and columns of one tile of the N x M similarity matrix.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..distributed import collectives
from .validation import Anchors, Queue

# Rows whose largest entry is below this count as zero: their direction is rounding noise.
ZERO_ROW = 1e-30
TRITON_MAX_DIM = 2048
"""Widest rows of the Triton kernels: a program holds whole rows in registers."""
# Rows that the backward pass of the normalization processes at a time.
_CHUNK = 8192
# The class of queue rows without labels: equal to no anchor's label, so they are negatives only.
NO_CLASS = torch.iinfo(torch.int64).min


class _FusedNormalizeRows(torch.autograd.Function):
    """_NormalizeRows in one kernel each way, for fp32 on CUDA: some 30 launches fewer, and no temporary tensor."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor | None, scale: Tensor) -> Tensor:
        from . import triton_rows

        on_device = scale if scale.device == x_ND.device else constant(float(scale), x_ND.device)
        u_ND, inverse_N1 = triton_rows.normalize(x_ND, order_N, on_device, ZERO_ROW)
        ctx.save_for_backward(x_ND, on_device, inverse_N1, order_N)
        ctx.scale_device = scale.device
        return u_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        from . import triton_rows

        x_ND, scale, inverse_N1, order_N = ctx.saved_tensors
        learned = ctx.needs_input_grad[2]
        grad_ND, radial_N = triton_rows.normalize_backward(grads[0], x_ND, order_N, scale, inverse_N1, radial=learned)
        grad_scale = None
        if radial_N is not None:
            grad_scale = (radial_N.sum(dtype=scale.dtype) / scale).to(ctx.scale_device)
        return grad_ND, None, grad_scale


@lru_cache(maxsize=16)
def constant(value: float, device: torch.device) -> Tensor:
    """0-dim fp64 on the device; cached, because the copy of a number waits for the device."""
    return torch.tensor(value, dtype=torch.float64, device=device)


def _has_kernel(x_ND: Tensor, scale: Tensor, dtype: torch.dtype) -> bool:
    if dtype != torch.float32 or scale.dtype != torch.float64 or not 0 < x_ND.shape[1] <= TRITON_MAX_DIM:
        return False
    # the interpreter is for the tests of the kernels, on the CPU
    return (x_ND.is_cuda and has_triton()) or os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class _NormalizeRows(torch.autograd.Function):
    """u = scale * x / |x|, rows taken in `order`; saves u alone, where autograd would keep four copies."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor:
        rows = (x_ND if order_N is None else x_ND.index_select(0, order_N)).to(dtype)
        # Divide by the largest entry first: squaring rows of 1e30, or of 1e-30, leaves the range of fp32.
        largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=1, keepdim=True)
        largest = torch.where(largest > ZERO_ROW, largest, 1.0)
        u_ND = rows / largest
        length = torch.linalg.vector_norm(u_ND, dim=1, keepdim=True)
        length = torch.where(length > 0, length, 1.0)
        u_ND.mul_(scale / length)
        ctx.save_for_backward(u_ND, scale, 1.0 / length / largest, order_N)
        ctx.dtype = x_ND.dtype
        return u_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        u_ND, scale, inverse_length, order_N = ctx.saved_tensors
        grad_ND = torch.empty_like(u_ND)
        # Only for a learned temperature: otherwise `scale` is on the CPU, and its gradient a wait for the device.
        grad_scale = torch.zeros_like(scale) if ctx.needs_input_grad[2] else None
        # In chunks: temporary tensors of all rows would double the memory of the backward pass at large N.
        for start in range(0, u_ND.shape[0], _CHUNK):
            chunk = slice(start, start + _CHUNK)
            grad_u = grads[0][chunk]
            radial = (grad_u * u_ND[chunk]).sum(1, keepdim=True)
            if grad_scale is not None:
                grad_scale += (radial.sum() / scale).to(scale)
            part = torch.addcmul(grad_u, u_ND[chunk], radial / -(scale * scale)).mul_(inverse_length[chunk] * scale)
            if order_N is None:
                grad_ND[chunk] = part
            else:
                grad_ND.index_copy_(0, order_N[chunk], part)
        return grad_ND.to(ctx.dtype), None, grad_scale, None


def normalize_rows(x_ND: Tensor, scale: Tensor, dtype: torch.dtype, order_N: Tensor | None = None) -> Tensor:
    """Rows of x at length `scale` (a 0-dim tensor, differentiable), in the given order, as `dtype`.

    Idempotent up to `scale`. A zero row stays zero and receives a finite gradient.
    """
    u_ND: Tensor
    if _has_kernel(x_ND, scale, dtype):
        u_ND = _FusedNormalizeRows.apply(x_ND, order_N, scale)
    else:
        u_ND = _NormalizeRows.apply(x_ND, order_N, scale, dtype)
    return u_ND


@dataclass(frozen=True)
class GatheredRows:
    """The rows that the anchors of one rank are compared with: one column of the similarity matrix each.

    u [M, D]: normalized rows of all ranks in rank order, then those of the queue. class_ids [M] int64: equal where
    the labels are equal, ascending within each of `blocks` (start, stop): one per rank, and one for the queue.
    The rank's own rows are u[own]. n_pos, n_neg [N] float64: the numbers of positives and negatives of each own
    row. rows_per_rank: as in Anchors. rows [N, D]: the own rows where they are others than u[own]; all of u is then
    constant, and row i is not compared with u[own][i].
    """

    u: Tensor
    class_ids: Tensor
    blocks: list[tuple[int, int]]
    own: slice
    n_pos: Tensor
    n_neg: Tensor
    rows_per_rank: list[int]
    rows: Tensor | None = None


def sort_and_gather(
    anchors: Anchors, queue: Queue | None, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, GatheredRows, Tensor]:
    """(the own rows u [N, D], differentiable; all rows, gathered without gradient; the order of the own rows).

    The rows of u are anchors.rows[order], sorted by label: positive pairs then lie in few tiles of the similarity
    matrix, and the other tiles need no comparison of labels. Where there are keys, they are gathered in place of the
    rows, at length 1, and the rows have length `scale` squared: the temperature's gradient is that of the rows alone.
    """
    labels_N, order_N = anchors.labels.sort(stable=True)
    if anchors.keys is None:
        u_ND = normalize_rows(anchors.rows, scale, dtype, order_N)
        return u_ND, _gather(u_ND.detach(), labels_N, anchors, queue, scale, dtype), order_N
    u_ND = normalize_rows(anchors.rows, scale * scale, dtype, order_N)
    one = torch.ones_like(scale)
    keys_ND = normalize_rows(anchors.keys.detach(), one, dtype, order_N)
    gathered = _gather(keys_ND, labels_N, anchors, queue, one, dtype)
    return u_ND, replace(gathered, rows=u_ND.detach()), order_N


def _gather(
    u_ND: Tensor, labels_N: Tensor, anchors: Anchors, queue: Queue | None, scale: Tensor, dtype: torch.dtype
) -> GatheredRows:
    rows = anchors.rows_per_rank
    spans_ranks = len(rows) > 1
    u_MD, labels_M = collectives.gather_rows_of([u_ND, labels_N], rows) if spans_ranks else (u_ND, labels_N)
    if queue is not None:
        past, past_labels = normalize_queue(queue, scale.detach(), dtype)
        past_labels, order = past_labels.sort()
        u_MD = torch.cat([u_MD, past.index_select(0, order)])
        labels_M = torch.cat([labels_M, past_labels])
    class_ids_M = consecutive_ids(labels_M, is_sorted=labels_M is labels_N)
    own = slice(anchors.offset, anchors.offset + u_ND.shape[0])
    n_pos, n_neg = count_pairs(class_ids_M, own)
    edges = [sum(rows[:r]) for r in range(len(rows) + 1)] + ([u_MD.shape[0]] if queue is not None else [])
    blocks = [(a, b) for a, b in pairwise(edges) if b > a]
    return GatheredRows(u_MD, class_ids_M, blocks, own, n_pos, n_neg, rows)


def normalize_queue(queue: Queue, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Past embeddings as further rows to compare with: (normalized, with a gradient by `scale` alone; their labels
    int64)."""
    return normalize_rows(queue[0].detach(), scale, dtype), queue_labels(queue)


def queue_labels(queue: Queue) -> Tensor:
    """The labels of past embeddings, int64. Without labels, they are negatives of every anchor."""
    past, labels = queue
    if labels is None:
        labels = torch.full((past.shape[0],), NO_CLASS, device=past.device)
    return labels.to(past.device, torch.int64)


def consecutive_ids(labels: Tensor, *, is_sorted: bool = False) -> Tensor:
    """0, 1, 2, ... in ascending order of the labels. Unlike torch.unique, it does not wait for the device."""
    if not len(labels):
        return labels
    values, order = (labels, None) if is_sorted else labels.sort()
    ids = torch.nn.functional.pad(values[1:] != values[:-1], (1, 0)).cumsum(0)
    return ids if order is None else torch.empty_like(values).index_copy_(0, order, ids)


def count_pairs(class_ids_M: Tensor, own: slice) -> tuple[Tensor, Tensor]:
    """|P(i)| and |N(i)| of the own rows, each [N] float64; i itself is in neither."""
    members = torch.zeros(class_ids_M.shape[0], dtype=torch.float64, device=class_ids_M.device)
    members.index_add_(0, class_ids_M, torch.ones_like(members))
    same_class_N = members.index_select(0, class_ids_M[own])
    return same_class_N - 1, class_ids_M.shape[0] - same_class_N
