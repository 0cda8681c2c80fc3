"""The autograd function of the tiled backends, which never store the whole similarity matrix.

z are unit rows, tau is the temperature, s_ij = z_i . z_j / tau, P(i) the other rows of anchor i's class and N(i) the
rows of other classes. The forward pass computes sums over the columns j of the similarity matrix, for every anchor i:

    sim_pos = sum_P s_ij      exp_pos = sum_P exp(s_ij)      exp_neg = sum_N exp(s_ij)
    inv_pos = sum_P exp(-z_i . z_j) = sum_P exp(-tau s_ij)

All contrastive losses of this package depend on the similarities through these sums alone:

    SupCon "out"  log(exp_pos + exp_neg) - sim_pos / |P|         Khosla et al. 2020, arXiv 2004.11362, equation 2
    SupCon "in"   log(exp_pos + exp_neg) - log(exp_pos / |P|)    the same, equation 3
    TCL           log(exp_pos + k1 inv_pos + k2 exp_neg) - sim_pos / |P|
                                                Animesh and Chandraker 2023, arXiv 2305.10675, equation 8
    SimCLR        as "out", where P(i) are the other views of the image    Chen et al. 2020, equation 1

The derivatives of the loss L by an anchor's sums are its four row weights: sim_weight = dL / dsim_pos, pos_weight =
dL / dexp_pos, neg_weight = dL / dexp_neg, inv_weight = dL / dinv_pos. For the "out" loss of one anchor, for example,
sim_weight = -1 / |P|, pos_weight = neg_weight = 1 / (exp_pos + exp_neg) and inv_weight = 0. By the chain rule,

    G_ij = dL / ds_ij = sim_weight_i + pos_weight_i exp(s_ij) - tau inv_weight_i exp(-tau s_ij)    for j in P(i)
                      = neg_weight_i exp(s_ij)                                                     for j in N(i)

Row i appears in s_ij as the anchor and in s_ji as a column. With u = z / sqrt(tau), s_ij = s_ji = u_i . u_j, and so

    dL / du_i = sum_j (G_ij + G_ji) u_j

G_ji needs nothing of the other ranks but their rows u_j and row weights. The backward pass therefore gathers four
numbers per row, where summing the gradients of the gathered rows over ranks would move D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..distributed import collectives
from .gathered import GatheredRows, sort_and_gather
from .validation import Anchors, Queue


@dataclass(frozen=True)
class RowSums:
    """Sums over the columns of the similarity matrix, for every own row: each [N], fp64 or fp32.

    Over P(i): sim_pos of s, exp_pos of exp(s), inv_pos of exp(-tau s), sim_inv_pos of s exp(-tau s); the last two
    are None where they were not asked for. Over N(i): exp_neg of exp(s).
    """

    sim_pos: Tensor
    exp_pos: Tensor
    exp_neg: Tensor
    inv_pos: Tensor | None
    sim_inv_pos: Tensor | None


class TiledBackend(Protocol):
    """Computes sums over the columns of the similarity matrix tile by tile."""

    def row_sums(self, gathered: GatheredRows, temperature: float | None) -> RowSums:
        """The sums of the own rows. `temperature`: None where inv_pos and sim_inv_pos are not needed."""
        ...

    def row_gradients(self, gathered: GatheredRows, weights_M4: Tensor, temperature: float | None) -> Tensor:
        """dL / du of the own rows, [N, D].

        `weights_M4`: sim_weight, pos_weight, neg_weight, inv_weight of all rows; zero for the queue's.
        `temperature`: None where every inv_weight is zero.
        """
        ...


class _TiledLogSums(torch.autograd.Function):
    """(u, temperature) -> mean_pos, log_pos, log_neg, log_inv of the own rows, each [N]; no log_inv without
    `temperature`."""

    @staticmethod
    def forward(
        ctx: Any,
        u_ND: Tensor,
        temperature: Tensor | None,
        gathered: GatheredRows,
        backend: TiledBackend,
        log_zero: float,
    ) -> tuple[Tensor, ...]:
        ctx.temperature = None if temperature is None else float(temperature.detach())
        sums = backend.row_sums(gathered, ctx.temperature)
        has_pos, has_neg = gathered.n_pos > 0, gathered.n_neg > 0

        def log(values: Tensor, not_empty: Tensor) -> Tensor:
            return torch.where(not_empty, values, 1.0).log().where(not_empty, log_zero)

        logs = [log(sums.exp_pos, has_pos), log(sums.exp_neg, has_neg)]
        if sums.inv_pos is not None:
            logs.append(log(sums.inv_pos, has_pos))
        mean_pos = sums.sim_pos / gathered.n_pos.clamp(min=1)
        # The backward pass frees saved tensors; what else `ctx` refers to lives as long as the loss.
        ctx.gathered, ctx.backend, ctx.dtype = replace(gathered, u=u_ND.new_empty(0)), backend, u_ND.dtype
        ctx.save_for_backward(gathered.u, temperature, sums.sim_inv_pos, *logs)
        return tuple(value.to(u_ND.dtype) for value in (mean_pos, *logs))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        u_MD, temperature, sim_inv_pos, *logs = ctx.saved_tensors
        gathered = replace(ctx.gathered, u=u_MD)
        with torch.autocast(gathered.u.device.type, enabled=False):
            weights_N4 = _row_weights(gathered, [grad.double() for grad in grads], logs)
            weights_M4 = weights_N4.to(ctx.dtype)
            if len(gathered.rows_per_rank) > 1:
                weights_M4 = collectives.gather_rows(weights_M4, gathered.rows_per_rank)
            queue_rows = gathered.u.shape[0] - weights_M4.shape[0]
            if queue_rows:
                weights_M4 = torch.cat([weights_M4, weights_M4.new_zeros(queue_rows, 4)])
            grad_ND = ctx.backend.row_gradients(gathered, weights_M4, ctx.temperature)
            grad_temperature = None
            if ctx.needs_input_grad[1]:
                # With s fixed, dinv_pos / dtau = -sum_P s exp(-tau s); autograd adds the share that goes through u.
                grad_temperature = -(weights_N4[:, 3] * sim_inv_pos).sum().to(temperature)
        return grad_ND, grad_temperature, None, None, None


def _row_weights(gathered: GatheredRows, grads: list[Tensor], logs: list[Tensor]) -> Tensor:
    """sim_weight, pos_weight, neg_weight, inv_weight of the own rows, [N, 4].

    `grads`: the loss's gradients by mean_pos and by `logs` (log_pos, log_neg and, where it was computed, log_inv).
    """
    has_pos = gathered.n_pos > 0
    # An anchor without positives counts in no mean. Where a loss's formula gives NaN for it (0 x inf), that NaN must
    # not reach other rows.
    grads = [torch.where(has_pos | torch.isfinite(grad), grad, 0.0) for grad in grads]
    not_empty = [has_pos, gathered.n_neg > 0, has_pos]
    weights = [torch.where(has_pos, grads[0] / gathered.n_pos.clamp(min=1), 0.0)]
    for grad, log, members in zip(grads[1:], logs, not_empty, strict=False):
        weights.append(torch.where(members, grad * torch.exp(-log), 0.0))
    if len(weights) == 3:
        weights.append(torch.zeros_like(weights[0]))
    return torch.stack(weights, dim=1)


def tiled_statistics(
    anchors: Anchors,
    queue: Queue | None,
    scale: Tensor,
    temperature: Tensor | None,
    dtype: torch.dtype,
    backend: TiledBackend,
    log_zero: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """n_pos, mean_pos, log_pos, log_neg, log_inv, valid of PairwiseStats, in the order of the anchors' rows.

    `scale` is 1 / sqrt(tau); `temperature` is tau, or None where log_inv is not needed; `log_zero` stands for log 0.
    """
    u_ND, gathered, order_N = sort_and_gather(anchors, queue, scale, dtype)
    original = torch.empty_like(order_N).index_copy_(0, order_N, torch.arange(len(order_N), device=order_N.device))
    values = _TiledLogSums.apply(u_ND, temperature, gathered, backend, log_zero)
    values = [value.index_select(0, original) for value in values]
    n_pos = gathered.n_pos.index_select(0, original).to(dtype)
    log_inv = values[3] if len(values) > 3 else None
    return n_pos, values[0], values[1], values[2], log_inv, n_pos > 0
