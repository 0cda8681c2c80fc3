"""Numbers that describe a batch of embeddings: their spread, and the gradient response of a loss (TCL)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.collectives import all_sum, gather_rows, gather_sizes, rank
from . import torch_tiled
from .gathered import GatheredRows, sort_and_gather
from .pairwise import compute_dtype, mean_and_sums
from .precision import float32_products
from .temperature import check_temperature
from .validation import Queue, prepare_anchors


@torch.no_grad()
def mean_similarity(features: Tensor) -> Tensor:
    """Mean cosine similarity of all pairs of different rows, over all ranks; 0-dim, 0 where there is one row.

    features [..., D]. A value near 1 means that all embeddings are nearly the same. Every rank must call this.
    """
    rows = torch.nn.functional.normalize(features.detach().flatten(0, -2).double(), dim=-1)
    total = all_sum(torch.cat([rows.sum(0), rows.new_tensor([len(rows)])]))
    # |sum of z|^2 is the sum over all pairs, including the pair of each row with itself
    sum_D, n = total[:-1], total[-1]
    return (sum_D.square().sum() - n) / (n * (n - 1)).clamp(min=1)


@torch.no_grad()
def embedding_std(features: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of the unit rows [..., D] of all ranks, times sqrt(D); 0-dim.

    0 where all embeddings are equal, and 1 where they are spread evenly over the sphere (Chen and He 2021, arXiv
    2011.10566, section 4.1). Every rank must call this.
    """
    rows = torch.nn.functional.normalize(features.detach().flatten(0, -2).double(), dim=-1)
    n, mean = all_sum(rows.new_tensor(len(rows))), all_sum(rows.sum(0))
    squares = all_sum((rows - mean / n).square().sum(0))
    return (squares / n).sqrt().mean() * rows.shape[-1] ** 0.5


@torch.no_grad()
def alignment_and_uniformity(features: Tensor, groups: Tensor, *, tile_size: int = 1024) -> tuple[Tensor, Tensor]:
    """(alignment, uniformity) of the unit rows of all ranks, 0-dim (Wang and Isola 2020, arXiv 2005.10242, t = 2).

    features [..., D]; groups int64 [...]: rows of one group are positives of each other. alignment: mean squared
    distance of positives, 0..4, 0 where there are none. uniformity: log of the mean of exp(-2 d^2) over all pairs of
    different rows, of which there must be two, -8..0. Every rank must call this.
    """
    z = torch.nn.functional.normalize(features.detach().flatten(0, -2).float(), dim=-1)
    sizes = gather_sizes(z)
    columns, column_groups = gather_rows(z, sizes), gather_rows(groups.flatten(), sizes)
    first, squares = sum(sizes[: rank()]), columns.square().sum(1)
    totals = torch.zeros(3, dtype=torch.float64, device=z.device)
    with torch.autocast(z.device.type, enabled=False), float32_products("fp32"):
        for start in range(first, first + len(z), tile_size):
            rows = slice(start, min(start + tile_size, first + len(z)))
            distances = squared_distances(columns[rows] @ columns.T, squares[rows], squares)
            distances.diagonal(start).zero_()
            positive = column_groups[rows, None] == column_groups
            totals[0] += (distances * positive).sum(dtype=torch.float64)
            totals[1] += positive.sum() - len(positive)
            totals[2] += distances.mul_(-2).exp_().sum(dtype=torch.float64) - len(positive)
    total, pairs, potential = all_sum(totals)
    return total / pairs.clamp(min=1), (potential / (len(columns) * (len(columns) - 1))).log()


def squared_distances(products: Tensor, row_squares: Tensor, column_squares: Tensor) -> Tensor:
    """|a_i - b_j|^2 [n, m] of rows whose products are a_i . b_j [n, m], and whose squared lengths are [n] and [m]."""
    return products.mul(-2).add_(column_squares).add_(row_squares[:, None]).clamp_(min=0)


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885, eq. 1) of the rows [..., D] of all ranks as one matrix, 0-dim.

    exp of the entropy of the singular values' shares of their sum, 1..D. A value far below D means that the
    embeddings fill few directions. Every rank must call this.
    """
    rows = features.detach().flatten(0, -2).double()
    return effective_rank_of(all_sum(rows.T @ rows))


def effective_rank_of(gram: Tensor) -> Tensor:
    """`effective_rank` from the products of the columns [D, D], float64; NaN where they are all 0.

    Eigenvalues below float64's rounding count as 0: singular values below about 1e-8 sqrt(D) of the largest.
    """
    eigenvalues = torch.linalg.eigvalsh(gram)
    rounding = eigenvalues[-1] * len(gram) * torch.finfo(gram.dtype).eps
    values = torch.where(eigenvalues > rounding, eigenvalues, 0.0).sqrt()
    share = values / values.sum()
    return torch.special.entr(share).sum().exp()


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
    tile_size: int = torch_tiled.TILE_SIZE,
) -> GradientResponse:
    """How strongly a loss attracts positives and repels negatives, averaged over anchors (lemmas 1 and 2 of TCL).

    positives: sum over P(i) of |P_ip - X_ip - Y_ip|, negatives: sum over N(i) of P_in, with

        P_ip = exp(s_ip) / D_i      X_ip = 1 / |P(i)|      Y_ip = temperature k1 exp(-z_i . z_p) / D_i
        P_in = k2 exp(s_in) / D_i   D_i = sum_P exp(s) + k1 sum_P exp(-z_i . z_p) + k2 sum_N exp(s)

    (Animesh and Chandraker 2023, arXiv 2305.10675.) k1 = 0, k2 = 1 is SupCon "out". Arguments as in
    `pairwise_stats`; every rank must call this. It computes the similarity matrix twice: for occasional logging.
    """
    check_temperature(temperature)
    anchors = prepare_anchors(features, labels, gather=gather, queue=queue)
    with torch.autocast(features.device.type, enabled=False):
        tau = torch.tensor(temperature, dtype=torch.float64)
        _, gathered, _ = sort_and_gather(anchors, queue, tau.rsqrt(), compute_dtype(features, temperature))
        sums = torch_tiled.TorchTiledBackend(tile_size).row_sums(gathered, tau)
        assert sums.inv_pos is not None
        denominator = sums.exp_pos + k1 * sums.inv_pos + k2 * sums.exp_neg
        positives = _positive_responses(gathered, denominator, temperature, k1, tile_size)
        valid = gathered.n_pos > 0
        mean, (count, total) = mean_and_sums(k2 * sums.exp_neg / denominator, valid, [positives.sum()], gather=gather)
    return GradientResponse(positives=total / count.clamp(min=1), negatives=mean)


def _positive_responses(
    gathered: GatheredRows, denominator: Tensor, temperature: float, k1: float, tile_size: int
) -> Tensor:
    """Sum over P(i) of |P_ip - X_ip - Y_ip| of every own row, [N] float64; zero without positives."""
    share = 1.0 / gathered.n_pos.clamp(min=1)  # X
    totals = torch.zeros_like(share)
    buffers = torch_tiled.TileBuffers(gathered, tile_size)
    for tile in torch_tiled.iterate_tiles(gathered, tile_size):
        if tile.positive is False:
            continue
        sim_RC = buffers.similarity(tile).double()
        positive_RC = buffers.positives(tile)
        response_RC = torch.exp(sim_RC) - temperature * k1 * torch.exp(-temperature * sim_RC)  # (P - Y) D_i
        sides = [(tile.rows, response_RC, positive_RC)]
        if tile.mirrored_rows is not None:
            sides.append((tile.mirrored_rows, response_RC.T, positive_RC.T))
        for rows, values, members in sides:
            response = (values / denominator[rows, None] - share[rows, None]).abs()
            totals[rows] += torch.where(members, response, 0.0).sum(1)
    return totals
