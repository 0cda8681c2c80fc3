"""How a batch lies: how alike its embeddings are, and how hard a loss pulls and pushes them (TCL), streamed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.collectives import all_sum
from . import torch_tiled
from .gathered import Columns, sorted_columns
from .pairwise import check_temperature, compute_dtype, mean_and_sums
from .validation import Queue, prepare


@torch.no_grad()
def mean_similarity(features: Tensor) -> Tensor:
    """Mean cosine similarity of all pairs of different rows, over all ranks; 0-dim, 0 where there is one row.

    features [..., D]. Near 1, the embeddings have collapsed into one. Every rank must call this.
    """
    rows = torch.nn.functional.normalize(features.detach().flatten(0, -2).double(), dim=-1)
    total = all_sum(torch.cat([rows.sum(0), rows.new_tensor([len(rows)])]))
    # |sum of z|^2 is the sum over all pairs, those of a row with itself among them
    direction, n = total[:-1], total[-1]
    return (direction.square().sum() - n) / (n * (n - 1)).clamp(min=1)


@dataclass(frozen=True)
class GradientResponse:
    """Means over the anchors of all ranks that have a positive; 0-dim tensors."""

    positives: Tensor
    negatives: Tensor


@torch.no_grad()
def gradient_response(
    features: Tensor,
    labels: Tensor | None,
    temperature: float,
    k1: float = 0.0,
    k2: float = 1.0,
    *,
    gather: bool = True,
    queue: Queue | None = None,
    tile: int = torch_tiled.TILE,
) -> GradientResponse:
    """How strongly positives attract and negatives repel, meaned over anchors (lemmas 1 and 2 of TCL).

    positives: sum over P(i) of |P_ip - X_ip - Y_ip|, negatives: sum over N(i) of P_in, with

        P_ip = exp(s_ip) / D_i      X_ip = 1 / |P(i)|      Y_ip = temperature k1 exp(-z_i . z_p) / D_i
        P_in = k2 exp(s_in) / D_i   D_i = sum_P exp(s) + k1 sum_P exp(-z_i . z_p) + k2 sum_N exp(s)

    (Animesh and Chandraker, 2023, arXiv 2305.10675.) k1 = 0, k2 = 1 is SupCon "out". Arguments as in
    `pairwise_stats`; every rank must call this. It costs two walks over the tiles: for logging now and then.
    """
    check_temperature(temperature)
    anchors = prepare(features, labels, gather=gather, queue=queue)
    with torch.autocast(features.device.type, enabled=False):
        scale = torch.tensor(temperature, dtype=torch.float64).rsqrt()
        _, columns, _ = sorted_columns(anchors, queue, scale, compute_dtype(features, temperature))
        sums = torch_tiled.Tiles(tile).row_sums(columns, temperature)
        assert sums.inv is not None
        denominator = sums.exp_pos + k1 * sums.inv + k2 * sums.exp_neg
        positives = _positive_responses(columns, denominator, temperature, k1, tile)
        valid = columns.n_pos > 0
        mean, (count, total) = mean_and_sums(k2 * sums.exp_neg / denominator, valid, [positives.sum()], gather=gather)
    return GradientResponse(positives=total / count.clamp(min=1), negatives=mean)


def _positive_responses(columns: Columns, denominator: Tensor, tau: float, k1: float, edge: int) -> Tensor:
    """Sum over P(i) of |P_ip - X_ip - Y_ip| of every own row, [n] float64; zero without positives."""
    share = 1.0 / columns.n_pos.clamp(min=1)
    totals = torch.zeros_like(share)
    work = torch_tiled.Workspace(columns, edge)
    for tile in torch_tiled.tiles(columns, edge):
        if tile.positive is False:
            continue
        s = work.similarity(tile).double()
        positive = work.positives(tile)
        pull = torch.exp(s) - tau * k1 * torch.exp(-tau * s)
        sides = [(tile.rows, pull, positive)]
        if tile.mirror is not None:
            sides.append((tile.mirror, pull.T, positive.T))
        for rows, values, members in sides:
            response = (values / denominator[rows, None] - share[rows, None]).abs()
            totals[rows] += torch.where(members, response, 0.0).sum(1)
    return totals
