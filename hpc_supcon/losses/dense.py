"""The dense backend (loss.backend=reference): the definition on full N x M matrices, differentiated by autograd.

It shares no algebra with the tiled backends, so tests compare them with it. It is also the fastest for small batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed import collectives
from .gathered import normalize_queue, normalize_rows
from .precision import float32_products
from .validation import Anchors, Queue


def dense_statistics(
    u_ND: Tensor,
    labels_N: Tensor,
    anchors: Anchors,
    queue: Queue | None,
    scale: Tensor,
    temperature: Tensor | None,
    log_zero: float,
    *,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """n_pos, mean_pos, log_pos, log_neg, log_inv of PairwiseStats for the rows u.

    `temperature`: None where log_inv is not needed. `log_zero` stands for log 0. `exact`: fp32 products on CUDA are
    not TF32, whatever the process has.
    """
    rows = anchors.rows_per_rank
    u_MD, labels_M = u_ND, labels_N
    if anchors.keys is not None:
        u_MD = normalize_rows(anchors.keys.detach(), scale, u_ND.dtype)
    if len(rows) > 1:
        u_MD = collectives.gather_rows_with_grad(u_MD, rows)
        labels_M = collectives.gather_rows(labels_N, rows)
    if queue is not None:
        past, past_labels = normalize_queue(queue, scale, u_ND.dtype)
        u_MD = torch.cat([u_MD, past])
        labels_M = torch.cat([labels_M, past_labels])
    sim_NM = _SimilarityMatrix.apply(u_ND, u_MD, exact)
    index = torch.arange(u_ND.shape[0], device=u_ND.device)
    other_NM = torch.ones_like(sim_NM, dtype=torch.bool)
    other_NM[index, anchors.offset + index] = False
    same_NM = labels_N[:, None] == labels_M[None, :]
    positive_NM, negative_NM = same_NM & other_NM, ~same_NM
    n_pos = positive_NM.sum(1).to(sim_NM.dtype)
    mean_pos = torch.where(positive_NM, sim_NM, 0.0).sum(1) / n_pos.clamp(min=1)
    log_inv = None if temperature is None else _log_sum_exp(-temperature * sim_NM, positive_NM, log_zero)
    log_pos = _log_sum_exp(sim_NM, positive_NM, log_zero)
    return n_pos, mean_pos, log_pos, _log_sum_exp(sim_NM, negative_NM, log_zero), log_inv


class _SimilarityMatrix(torch.autograd.Function):
    """a @ b.T whose backward pass stays in the dtype of a, also when it runs inside an autocast block."""

    @staticmethod
    def forward(ctx: Any, a_ND: Tensor, b_MD: Tensor, exact: bool) -> Tensor:
        ctx.save_for_backward(a_ND, b_MD)
        ctx.precision = "fp32" if exact else None
        with float32_products(ctx.precision):
            return a_ND @ b_MD.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        a_ND, b_MD = ctx.saved_tensors
        with torch.autocast(a_ND.device.type, enabled=False), float32_products(ctx.precision):
            return grads[0] @ b_MD, grads[0].T @ a_ND, None


def _log_sum_exp(sim_NM: Tensor, members_NM: Tensor, log_zero: float) -> Tensor:
    # A finite number in place of -inf: the result and the gradient of a row without members stay finite.
    logs = torch.logsumexp(sim_NM.masked_fill(~members_NM, log_zero), dim=1)
    return torch.where(members_NM.any(1), logs, log_zero)
