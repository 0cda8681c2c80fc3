"""A contrastive loss and its gradient in float64, a block of anchors at a time: an oracle for batches of any size.

It shares nothing with hpc_supcon; tests/brute_force.py has the same formulas pair by pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def value_and_gradient(
    features: Tensor,
    labels: Tensor,
    tau: float,
    *,
    k1: float = 0.0,
    queue: tuple[Tensor, Tensor] | None = None,
    block: int = 1024,
) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d features) of SupCon "out" or, with k1 > 0, of TCL with k2 = 1: means over anchors.

    features [N, D], labels [N]; queue: (past embeddings [Q, D], their labels [Q]), columns without gradient. Takes
    memory for some matrices of block x (N + Q) in float64, and one of N x (N + Q) bytes.
    """
    x = features.detach().double().requires_grad_()
    past, columns = x.new_empty(0, x.shape[1]), labels
    if queue is not None:
        past, columns = F.normalize(queue[0].double(), dim=1), torch.cat([labels, queue[1]])
    count = int(((labels[:, None] == columns[None]).sum(1) > 1).sum())
    value, places = x.new_zeros(()), torch.arange(len(columns), device=x.device)
    for start in range(0, len(x) if count else 0, block):
        anchors = places[start : min(start + block, len(x))]
        same, itself = labels[anchors, None] == columns[None], anchors[:, None] == places[None]
        has_positive = (same & ~itself).any(1)
        anchors, positive, itself = anchors[has_positive], (same & ~itself)[has_positive], itself[has_positive]
        rows = F.normalize(x, dim=1)
        dots = rows[anchors] @ torch.cat([rows, past]).T
        denominator = (dots / tau).masked_fill(itself, float("-inf")).logsumexp(1)
        if k1:
            inverse = (-dots).masked_fill(~positive, float("-inf")).logsumexp(1)
            denominator = torch.logaddexp(denominator, inverse + torch.tensor(k1).log())
        of_anchors = denominator - (dots / tau * positive).sum(1) / positive.sum(1)
        part = of_anchors.sum() / count
        part.backward()
        value += part.detach()
    return value, torch.zeros_like(x) if x.grad is None else x.grad
