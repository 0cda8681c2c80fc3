"""The dense backend: the definition itself on full matrices, differentiated by autograd.

It shares no algebra with the streamed backends, so it can judge them. Memory O(n x M).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed import collectives
from .gathered import queue_columns
from .validation import Anchors, Queue


def row_statistics(
    u: Tensor,
    labels: Tensor,
    anchors: Anchors,
    queue: Queue | None,
    scale: Tensor,
    kappa: Tensor | None,
    empty: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """n_pos, mean_pos, log_pos, log_neg, log_inv of the rows u [n, D]; `empty` stands for log 0."""
    rows = anchors.rows_per_rank
    columns, column_labels = u, labels
    if len(rows) > 1:
        columns = collectives.gather_rows_with_grad(u, rows)
        column_labels = collectives.gather_rows(labels, rows)
    if queue is not None:
        past, past_labels = queue_columns(queue, scale, u.dtype)
        columns = torch.cat([columns, past])
        column_labels = torch.cat([column_labels, past_labels])
    s = _Dots.apply(u, columns)
    this = torch.arange(u.shape[0], device=u.device)
    other = torch.ones_like(s, dtype=torch.bool)
    other[this, anchors.offset + this] = False
    same = labels[:, None] == column_labels[None, :]
    positive, negative = same & other, ~same
    n_pos = positive.sum(1).to(s.dtype)
    mean_pos = torch.where(positive, s, 0.0).sum(1) / n_pos.clamp(min=1)
    log_inv = None if kappa is None else _log_sum_exp(-kappa * s, positive, empty)
    return n_pos, mean_pos, _log_sum_exp(s, positive, empty), _log_sum_exp(s, negative, empty), log_inv


class _Dots(torch.autograd.Function):
    """a @ b.T whose backward stays in the dtype of a, also when it runs inside an autocast block."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        a, b = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            return grads[0] @ b, grads[0].T @ a


def _log_sum_exp(s: Tensor, members: Tensor, empty: float) -> Tensor:
    # `empty` in place of -inf: a row without members is then a finite number with a zero gradient.
    logs = torch.logsumexp(s.masked_fill(~members, empty), dim=1)
    return torch.where(members.any(1), logs, empty)
