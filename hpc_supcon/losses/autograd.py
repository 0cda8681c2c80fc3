"""The autograd side of the streamed backends: row sums forward, four numbers per row backward.

With G_ij = dL/ds_ij of all ranks' losses, s symmetric in its arguments, the gradient of an own row is

    du_i = sum_j (G_ij + G_ji) u_j
    G_ij = c_i + p_i exp(s_ij) - kappa f_i exp(-kappa s_ij)   for j in P(i)
         = n_i exp(s_ij)                                      for j in N(i)

where u = z / sqrt(tau), kappa = tau. So each rank needs only the other rows' (c, p, n, f), and the
backward pass moves 4 numbers per row instead of D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..distributed import collectives
from . import gathered
from .gathered import Columns
from .validation import Anchors, Queue


@dataclass(frozen=True)
class RowSums:
    """Sums over columns, each [n] in fp64 or fp32.

    Over P(i): s_pos of s, exp_pos of exp(s), inv of exp(-kappa s), s_inv of s exp(-kappa s) (the last two
    None without kappa); over N(i): exp_neg of exp(s).
    """

    s_pos: Tensor
    exp_pos: Tensor
    exp_neg: Tensor
    inv: Tensor | None
    s_inv: Tensor | None


class Kernels(Protocol):
    """A streamed backend: how the two sums over columns are computed."""

    def row_sums(self, columns: Columns, kappa: float | None) -> RowSums: ...

    def row_gradients(self, columns: Columns, coefficients: Tensor, kappa: float | None) -> Tensor:
        """du [n, D] from the coefficients [M, 4] = (c, p, n, f) of all columns; zero for the queue's."""
        ...


class _Streamed(torch.autograd.Function):
    """(u, kappa) -> mean_pos, log_pos, log_neg, log_inv of the own rows, each [n]."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, kappa: Tensor | None, columns: Columns, kernels: Kernels, empty: float
    ) -> tuple[Tensor, ...]:
        ctx.kappa = None if kappa is None else float(kappa.detach())
        sums = kernels.row_sums(columns, ctx.kappa)
        has_pos, has_neg = columns.n_pos > 0, columns.n_neg > 0

        def log(values: Tensor, members: Tensor) -> Tensor:
            return torch.where(members, values, 1.0).log().where(members, empty)

        logs = [log(sums.exp_pos, has_pos), log(sums.exp_neg, has_neg)]
        if sums.inv is not None:
            logs.append(log(sums.inv, has_pos))
        mean_pos = sums.s_pos / columns.n_pos.clamp(min=1)
        # Saved tensors are freed by the backward pass, what else `ctx` holds lives as long as the loss.
        ctx.columns, ctx.kernels, ctx.dtype = replace(columns, u=u.new_empty(0)), kernels, u.dtype
        ctx.save_for_backward(columns.u, kappa, sums.s_inv, *logs)
        return tuple(value.to(u.dtype) for value in (mean_pos, *logs))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        every_u, kappa, s_inv, *logs = ctx.saved_tensors
        columns = replace(ctx.columns, u=every_u)
        with torch.autocast(columns.u.device.type, enabled=False):
            own = _coefficients(columns, [grad.double() for grad in grads], logs)
            every = own.to(ctx.dtype)
            if len(columns.rows_per_rank) > 1:
                every = collectives.gather_rows(every, columns.rows_per_rank)
            queue = columns.u.shape[0] - every.shape[0]
            if queue:
                every = torch.cat([every, every.new_zeros(queue, 4)])
            du = ctx.kernels.row_gradients(columns, every, ctx.kappa)
            d_kappa = None
            if ctx.needs_input_grad[1]:
                d_kappa = -(own[:, 3] * s_inv).sum().to(kappa)
        return du, d_kappa, None, None, None


def _coefficients(columns: Columns, grads: list[Tensor], logs: list[Tensor]) -> Tensor:
    """(c, p, n, f) [n, 4] of the own rows from the gradients of mean_pos and of the logs."""
    valid = columns.n_pos > 0
    # An anchor without positives counts in no mean; a formula may give NaN there (0 x inf), never beyond.
    grads = [torch.where(valid | torch.isfinite(grad), grad, 0.0) for grad in grads]
    members = [valid, columns.n_neg > 0, valid]
    parts = [torch.where(valid, grads[0] / columns.n_pos.clamp(min=1), 0.0)]
    for grad, log, any_member in zip(grads[1:], logs, members, strict=False):
        parts.append(torch.where(any_member, grad * torch.exp(-log), 0.0))
    if len(parts) == 3:
        parts.append(torch.zeros_like(parts[0]))
    return torch.stack(parts, dim=1)


def streamed_statistics(
    anchors: Anchors,
    queue: Queue | None,
    scale: Tensor,
    kappa: Tensor | None,
    dtype: torch.dtype,
    kernels: Kernels,
    empty: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """n_pos, mean_pos, log_pos, log_neg, log_inv, valid in the order of the anchors' rows."""
    u, columns, order = gathered.sorted_columns(anchors, queue, scale, dtype)
    back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    values = [v.index_select(0, back) for v in _Streamed.apply(u, kappa, columns, kernels, empty)]
    n_pos = columns.n_pos.index_select(0, back).to(dtype)
    log_inv = values[3] if len(values) > 3 else None
    return n_pos, values[0], values[1], values[2], log_inv, n_pos > 0
