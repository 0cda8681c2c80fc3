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

Columns without gradient (of a queue) have weights of zero, G_ji = 0. The temperature scales them all the same: s_ij
depends on it through u_j as much as through u_i. Its gradient through u_i is therefore half of that of these columns,
and is counted twice.
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

    def row_sums(self, gathered: GatheredRows, temperature: Tensor | None) -> RowSums:
        """The sums of the own rows. `temperature`: 0-dim; None where inv_pos and sim_inv_pos are not needed."""
        ...

    def row_gradients(self, gathered: GatheredRows, weights_M4: Tensor, temperature: Tensor | None) -> Tensor:
        """dL / du of the own rows, [N, D].

        `weights_M4`: sim_weight, pos_weight, neg_weight, inv_weight of all rows; zero for the queue's. Where there
        are `gathered.rows`, only those of the own rows are read. `temperature`: 0-dim; None where every inv_weight is
        zero.
        """
        ...


class _TiledLogSums(torch.autograd.Function):
    """(u, temperature) -> n_pos, mean_pos, log_pos, log_neg, log_inv of the own rows, each [N]; no log_inv without
    `temperature`. Row i of u is anchor order[i], of the results anchor i: sorting costs one operation each way.

    The statistics are rows of one matrix, so that an operation computes all of them: on CUDA, the host needs more
    time to launch an operation on [N] numbers than the device to compute it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u_ND: Tensor,
        temperature: Tensor | None,
        gathered: GatheredRows,
        order_N: Tensor,
        backend: TiledBackend,
        log_zero: float,
        learns_scale: bool,
    ) -> tuple[Tensor, ...]:
        sums = backend.row_sums(gathered, None if temperature is None else temperature.detach())
        rows, empty_KN, divisors_KN = log_sums(gathered.n_pos, gathered.n_neg, sums, log_zero, u_ND.dtype)
        # The backward pass frees saved tensors; what else `ctx` refers to lives as long as the loss.
        ctx.gathered, ctx.backend, ctx.dtype = replace(gathered, u=u_ND.new_empty(0)), backend, u_ND.dtype
        ctx.learns_scale = learns_scale
        ctx.save_for_backward(gathered.u, temperature, sums.sim_inv_pos, order_N, empty_KN, divisors_KN)
        n_pos, *values = torch.empty_like(rows).index_copy_(1, order_N, rows).unbind()
        ctx.mark_non_differentiable(n_pos)
        return n_pos, *values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        u_MD, temperature, sim_inv_pos, order_N, empty_KN, divisors_KN = ctx.saved_tensors
        gathered = replace(ctx.gathered, u=u_MD)
        with torch.autocast(gathered.u.device.type, enabled=False):
            grads_KN = torch.stack(grads[1:]).index_select(1, order_N).to(divisors_KN.dtype)
            weights_KN = row_weights(grads_KN, empty_KN, divisors_KN)
            grad_temperature = None
            if ctx.needs_input_grad[1]:
                # With s fixed, dinv_pos / dtau = -sum_P s exp(-tau s); autograd adds the share that goes through u.
                grad_temperature = -(weights_KN[3] * sim_inv_pos).sum().to(temperature)
            weights_M4 = _weights_M4(weights_KN.to(ctx.dtype), gathered)
            grad_ND = ctx.backend.row_gradients(gathered, weights_M4, temperature)
            if ctx.learns_scale:
                grad_ND += _radial_of_queue(gathered, weights_M4, temperature, ctx.backend)
        return grad_ND, grad_temperature, None, None, None, None, None


def _weights_M4(weights_KN: Tensor, gathered: GatheredRows) -> Tensor:
    """The argument `weights_M4` of TiledBackend.row_gradients. Collective."""
    if gathered.rows is None:
        return weights_of_columns(weights_KN, gathered.rows_per_rank, len(gathered.u))
    weights_M4 = weights_KN.new_zeros(len(gathered.u), 4)
    weights_M4[gathered.own, : len(weights_KN)] = weights_KN.T
    return weights_M4


def _radial_of_queue(
    gathered: GatheredRows, weights_M4: Tensor, temperature: Tensor | None, backend: TiledBackend
) -> Tensor:
    """The part along u of the queue's share of the gradients of the own rows, [N, D].

    Added to them, it counts that share twice in the gradient of the rows' length, and changes nothing else.
    """
    own_ND, past = gathered.u[gathered.own], gathered.u.clone()
    past[: sum(gathered.rows_per_rank)] = 0.0  # a column of zeros adds nothing to G u
    share_ND = backend.row_gradients(replace(gathered, u=past, rows=own_ND), weights_M4, temperature)
    squared_N1 = own_ND.square().sum(1, keepdim=True)
    along_N1 = (share_ND * own_ND).sum(1, keepdim=True) / torch.where(squared_N1 > 0, squared_N1, 1.0)
    return own_ND * along_N1


def log_sums(
    n_pos: Tensor, n_neg: Tensor, sums: RowSums, log_zero: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(n_pos, mean_pos, log_pos, log_neg and, where it was summed, log_inv, [1 + K, N] of `dtype`; the arguments
    `empty_KN` and `divisors_KN` of `row_weights`)."""
    counts, sums_KN = [n_pos, n_pos, n_neg], [n_pos, sums.exp_pos, sums.exp_neg]
    if sums.inv_pos is not None:
        counts, sums_KN = [*counts, n_pos], [*sums_KN, sums.inv_pos]
    empty_KN, divisors_KN = torch.stack(counts) == 0, torch.stack(sums_KN)
    found = divisors_KN.log().masked_fill_(empty_KN, log_zero)
    divisors_KN.masked_fill_(empty_KN, 1.0)
    found[0] = sums.sim_pos / divisors_KN[0]
    return torch.cat([n_pos[None], found]).to(dtype), empty_KN, divisors_KN


def row_weights(grads_KN: Tensor, empty_KN: Tensor, divisors_KN: Tensor) -> Tensor:
    """sim_weight, pos_weight, neg_weight and, where it is needed, inv_weight of the own rows, [K, N].

    `grads_KN`: the loss's gradients by mean_pos, log_pos, log_neg and log_inv; `empty_KN`: where these are over no
    row; `divisors_KN`: the number of positives, then the sums of which they are logarithms.
    """
    # An anchor without positives counts in no mean. Where a loss's formula gives NaN for it (0 x inf), that NaN must
    # not reach other rows.
    grads_KN = torch.where(empty_KN[0], grads_KN.nan_to_num(0.0, 0.0, 0.0), grads_KN)
    return (grads_KN / divisors_KN).masked_fill_(empty_KN, 0.0)


def weights_of_columns(weights_KN: Tensor, rows_per_rank: list[int], columns: int) -> Tensor:
    """The four weights of the rows of all ranks and the queue, [M, 4], from `row_weights`; missing ones are zero.

    `columns`: M. Without other ranks it is a transposed view: backends read one weight of many rows. Collective.
    """
    weights = (
        torch.nn.functional.pad(weights_KN, (0, 0, 0, 4 - len(weights_KN))) if len(weights_KN) < 4 else weights_KN
    )
    if len(rows_per_rank) > 1:
        weights = collectives.gather_rows(weights.T.contiguous(), rows_per_rank).T
    queue_rows = columns - weights.shape[1]
    return (torch.nn.functional.pad(weights, (0, queue_rows)) if queue_rows else weights).T


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
    learns_scale = queue is not None and anchors.keys is None and scale.requires_grad
    n_pos, *values = _TiledLogSums.apply(u_ND, temperature, gathered, order_N, backend, log_zero, learns_scale)
    log_inv = values[3] if len(values) > 3 else None
    return n_pos, values[0], values[1], values[2], log_inv, n_pos > 0
