"""The autograd functions of the Triton backend: the statistics of the anchors, and in one step a whole loss.

On CUDA the host needs more time to launch an operation on N numbers than the device to compute it. Everything between
the features and the sums of the similarity matrix, and between these and the loss, is therefore a kernel of its own,
and the normalization belongs to the function. Imported only when it is used. The equations are in autograd.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import collectives
from . import triton_formula
from .autograd import RowSums, log_sums, row_weights, weights_of_columns
from .formula import Formula
from .gathered import ZERO_ROW, constant, queue_labels
from .pairwise import Call
from .triton_backend import Operands, TritonBackend
from .triton_rows import normalize_backward


class _Rows(NamedTuple):
    """The anchors as the kernels need them, and what the backward pass needs to know of their normalization.

    temperature: tau, scale: 1 / sqrt(tau), both 0-dim on the device. Own row i is x[order[i]], whose length is
    1 / inverse_length[i]. The last four: see Operands.
    """

    x: Tensor
    temperature: Tensor
    scale: Tensor
    order: Tensor
    inverse_length: Tensor
    own_u: Tensor
    u: Tensor
    bounds: Tensor
    column_order: Tensor | None

    @property
    def operands(self) -> Operands:
        return Operands(self.own_u, self.u, self.bounds, self.column_order)


def _prepare(call: Call, backend: TritonBackend, x_ND: Tensor, temperature: Tensor) -> _Rows:
    """Collective."""
    if isinstance(call.temperature, Tensor):
        scale = temperature.rsqrt()
    else:
        scale = constant(call.temperature**-0.5, x_ND.device)
    labels_N, order_N = call.anchors.labels.sort(stable=True)
    own_u, inverse_N1 = backend.operand(x_ND, order_N, scale, ZERO_ROW)
    u_MD, labels_M = _gather(call, backend, own_u[:, : x_ND.shape[1]], labels_N, scale)
    operands = backend.operands(own_u, u_MD, labels_M, call.anchors.offset)
    return _Rows(x_ND, temperature, scale, order_N, inverse_N1, *operands)


def _gather(
    call: Call, backend: TritonBackend, u_ND: Tensor, labels_N: Tensor, scale: Tensor
) -> tuple[Tensor | None, Tensor]:
    """(the operands [M, D] of all ranks and of the queue, None where these are the own ones; their labels)."""
    rows, queue = call.anchors.rows_per_rank, call.queue
    if len(rows) == 1 and queue is None:
        return None, labels_N
    # Operands are rounded before they travel: with bf16 products, half the bytes of fp32 rows.
    u_MD, labels_M = u_ND.to(backend.row_dtype), labels_N
    if len(rows) > 1:
        u_MD, labels_M = collectives.gather_rows_of([u_MD, labels_M], rows)
    if queue is not None:
        past, _ = backend.operand(queue[0].detach(), None, scale, ZERO_ROW, padded=False)
        u_MD = torch.cat([u_MD, past.to(u_MD.dtype)])
        labels_M = torch.cat([labels_M, queue_labels(queue)])
    return u_MD, labels_M


def _gradients(
    backend: TritonBackend,
    rows_per_rank: list[int],
    rows: _Rows,
    weights_4N: Tensor,
    inverse_term: Tensor | None,
    learns_temperature: bool,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dL / dx [N, D], dL / dtau where it is asked for). Collective.

    `weights_4N`: of the own rows. `inverse_term`: sum of inv_weight sim_inv_pos; None where inv_weight is zero.
    `factor`: multiplies the weights, in effect.
    """
    operands = rows.operands
    weights_M4 = weights_of_columns(weights_4N, rows_per_rank, len(operands.u))
    if operands.order is not None:
        weights_M4 = weights_M4.index_select(0, operands.order)
    tau = None if inverse_term is None else rows.temperature
    weights_4M = weights_M4.T.contiguous()

    def backward(operands: Operands) -> tuple[Tensor, Tensor | None]:
        parts = backend.gradients(operands, weights_4M, tau)
        return normalize_backward(
            parts, rows.x, rows.order, rows.scale, rows.inverse_length, radial=learns_temperature, factor=factor
        )

    grad_ND, radial_N = backward(operands)
    if radial_N is None:
        return grad_ND, None
    radial = radial_N.sum(dtype=torch.float64)
    in_batch = sum(rows_per_rank)
    if operands.order is not None and len(operands.u) > in_batch:
        # the queue's share counts twice, see autograd.py; a column of zeros adds nothing to it
        past = operands.u.masked_fill((operands.order < in_batch)[:, None], 0.0)
        _, radial_of_queue_N = backward(operands._replace(u=past))
        assert radial_of_queue_N is not None
        radial += radial_of_queue_N.sum(dtype=torch.float64)
    # u = z / sqrt(tau); and with s fixed, dinv_pos / dtau = -sum_P s exp(-tau s).
    grad_tau = radial * (-0.5 / rows.temperature)
    return grad_ND, grad_tau if inverse_term is None else grad_tau - inverse_term


class _Statistics(torch.autograd.Function):
    """(x, temperature) -> n_pos, mean_pos, log_pos, log_neg of the own rows and with `inverse` log_inv, each [N]."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, temperature: Tensor, call: Call, inverse: bool, log_zero: float
    ) -> tuple[Tensor, ...]:
        backend = TritonBackend(call.precision)
        rows = _prepare(call, backend, x_ND, temperature)
        parts = backend.sums(rows.operands, temperature if inverse else None)
        sim_pos, exp_pos, exp_neg, inv_pos, sim_inv_pos = parts.sum(0)
        sums = RowSums(sim_pos, exp_pos, exp_neg, *((inv_pos, sim_inv_pos) if inverse else (None, None)))
        first, stop, _ = rows.bounds.double()
        n_pos, n_neg = stop - first - 1, len(rows.u) - (stop - first)
        found, empty_KN, divisors_KN = log_sums(n_pos, n_neg, sums, log_zero, torch.float32)
        # The backward pass frees saved tensors; what else `ctx` refers to lives as long as the loss.
        ctx.backend, ctx.rows_per_rank, ctx.inverse = backend, call.anchors.rows_per_rank, inverse
        ctx.save_for_backward(*rows, sums.sim_inv_pos, empty_KN, divisors_KN)
        n_pos, *values = torch.empty_like(found).index_copy_(1, rows.order, found).unbind()
        ctx.mark_non_differentiable(n_pos)
        return n_pos, *values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        *tensors, sim_inv_pos, empty_KN, divisors_KN = ctx.saved_tensors
        rows = _Rows(*tensors)
        grads_KN = torch.stack(grads[1:]).index_select(1, rows.order).to(divisors_KN.dtype)
        weights_KN = row_weights(grads_KN, empty_KN, divisors_KN)
        inverse_term = (weights_KN[3] * sim_inv_pos).sum() if ctx.inverse else None
        learns = ctx.needs_input_grad[1]
        found = _gradients(ctx.backend, ctx.rows_per_rank, rows, weights_KN.float(), inverse_term, learns)
        return *found, None, None, None


class _MeanLoss(torch.autograd.Function):
    """(x, temperature) -> the mean of a formula over the anchors of all ranks that have a positive, 0-dim fp32; and
    [4] fp64 over all ranks: the sum of their losses, and the numbers of those anchors, of positive pairs, of anchors.

    The derivatives by the sums come with the formula's value: the backward pass only multiplies them.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, temperature: Tensor, call: Call, formula: Formula) -> tuple[Tensor, Tensor]:
        backend = TritonBackend(call.precision)
        rows = _prepare(call, backend, x_ND, temperature)
        sums = backend.sums(rows.operands, temperature if formula.inverse else None)
        weights_4N, partial, inverse_terms = triton_formula.anchor_terms(sums, rows.bounds, formula)
        ranks = len(call.anchors.rows_per_rank)
        if ranks > 1:
            partial = collectives.all_sum(partial.sum(0))
        mean, share, totals = triton_formula.anchor_mean(partial, ranks)
        ctx.backend, ctx.rows_per_rank = backend, call.anchors.rows_per_rank
        ctx.save_for_backward(*rows, weights_4N, inverse_terms, share)
        ctx.mark_non_differentiable(totals)
        ctx.set_materialize_grads(False)
        return mean, totals

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        *tensors, weights_4N, inverse_term, share = ctx.saved_tensors
        factor, learns = grads[0] * share, ctx.needs_input_grad[1]
        if inverse_term is not None and learns:
            inverse_term = inverse_term.sum() * factor
        if len(ctx.rows_per_rank) > 1:
            # Every rank may give its own gradient. The share is left for the end: it is not a power of two, and the
            # products of weights are rounded, which would then depend on the number of ranks.
            weights_4N, factor = weights_4N * grads[0], share
        found = _gradients(ctx.backend, ctx.rows_per_rank, _Rows(*tensors), weights_4N, inverse_term, learns, factor)
        return *found, None, None


def _temperature(call: Call) -> Tensor:
    """tau, 0-dim on the device."""
    if isinstance(call.temperature, Tensor):
        return call.temperature
    return constant(call.temperature, call.anchors.rows.device)


def triton_statistics(
    call: Call, *, inverse: bool, log_zero: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """n_pos, mean_pos, log_pos, log_neg, log_inv, valid of PairwiseStats, in the order of the anchors' rows.

    `log_zero` stands for log 0. Collective.
    """
    n_pos, *values = _Statistics.apply(call.anchors.rows, _temperature(call), call, inverse, log_zero)
    return n_pos, values[0], values[1], values[2], values[3] if inverse else None, n_pos > 0


def triton_mean_loss(call: Call, formula: Formula) -> tuple[Tensor, Tensor]:
    """The results of _MeanLoss. Collective."""
    mean, totals = _MeanLoss.apply(call.anchors.rows, _temperature(call), call, formula)
    return mean, totals
