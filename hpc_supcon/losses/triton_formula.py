"""The Triton kernels that make a loss of the sums of its anchors: the formula, its derivatives, and the mean.

They compute what formula.Formula and contrastive._AnchorMean do with PyTorch operations, which are some 40 launches
of a few numbers each. Per anchor in fp64: the formula is a few operations per row, the sums of a row thousands.
"""

# Triton reads the annotations of a kernel: its parameters cannot carry Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formula import Formula
from .triton_sizes import ceil_div

_ANCHORS = 256


@triton.jit
def _sum_of_splits(sums, which, i, n, splits, inside):
    """sums[:, which, i] [splits, 5, n] added in the order of the splits, fp64."""
    total = tl.zeros_like(i).to(tl.float64)
    for k in range(splits):
        total += tl.load(sums + (k * 5 + which) * n + i, mask=inside, other=0.0).to(tl.float64)
    return total


@triton.jit
def _formula_kernel(
    sums, bounds, weights, partial, inverse_terms, n, splits, k1, k2,
    INSIDE: tl.constexpr, INVERSE: tl.constexpr, ANCHORS: tl.constexpr,
):  # fmt: skip
    """From sums [splits, 5, n] and bounds [3, n] of sums_kernel, for every anchor i with a positive: weights [4, n],
    the derivatives of its loss by sim_pos, exp_pos, exp_neg and inv_pos; zero for the others.

    partial [programs, 4] fp64: of the program's anchors, the sum of the losses, and the numbers of anchors with a
    positive, of positive pairs, and of anchors. inverse_terms [programs] fp64: the sum of inv_weight sim_inv_pos.
    """
    i = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    inside = i < n
    n_pos = tl.load(bounds + n + i, mask=inside, other=1) - tl.load(bounds + i, mask=inside, other=0) - 1
    valid = inside & (n_pos > 0)
    positives = tl.where(valid, n_pos, 1).to(tl.float64)
    exp_pos = tl.where(valid, _sum_of_splits(sums, 1, i, n, splits, inside), 1.0)
    others = k2 * _sum_of_splits(sums, 2, i, n, splits, inside)
    if INVERSE:
        others += k1 * _sum_of_splits(sums, 3, i, n, splits, inside)
    denominator = exp_pos + others
    share = 1.0 / denominator
    if INSIDE:
        loss = tl.log(denominator) - tl.log(exp_pos / positives)
        pos_weight = -others * share / exp_pos
    else:
        loss = tl.log(denominator) - _sum_of_splits(sums, 0, i, n, splits, inside) / positives
        pos_weight = share
    sim_weight = tl.zeros_like(share) if INSIDE else -1.0 / positives
    tl.store(weights + i, tl.where(valid, sim_weight, 0.0).to(tl.float32), mask=inside)
    tl.store(weights + n + i, tl.where(valid, pos_weight, 0.0).to(tl.float32), mask=inside)
    tl.store(weights + 2 * n + i, tl.where(valid, k2 * share, 0.0).to(tl.float32), mask=inside)
    inv_weight = tl.where(valid, k1 * share, 0.0) if INVERSE else tl.zeros_like(share)
    tl.store(weights + 3 * n + i, inv_weight.to(tl.float32), mask=inside)
    to = partial + tl.program_id(0) * 4
    tl.store(to, tl.sum(tl.where(valid, loss, 0.0), 0))
    tl.store(to + 1, tl.sum(valid.to(tl.float64), 0))
    tl.store(to + 2, tl.sum(tl.where(inside, n_pos, 0).to(tl.float64), 0))
    tl.store(to + 3, tl.sum(inside.to(tl.float64), 0))
    if INVERSE:
        term = inv_weight * _sum_of_splits(sums, 4, i, n, splits, inside)
        tl.store(inverse_terms + tl.program_id(0), tl.sum(term, 0))


@triton.jit
def _mean_kernel(partial, sums, mean, share, programs, ranks, PROGRAMS: tl.constexpr):
    """sums [4] = the sum of partial [programs, 4]; mean = sums[0] / anchors with a positive, share = ranks / the same
    number; both fp32. In one program, in a fixed order."""
    column = tl.arange(0, 4)
    total = tl.zeros([4], tl.float64)
    for start in range(0, programs, PROGRAMS):
        row = start + tl.arange(0, PROGRAMS)
        at = partial + row[:, None] * 4 + column[None, :]
        total += tl.sum(tl.load(at, mask=(row < programs)[:, None], other=0.0), 0)
    tl.store(sums + column, total)
    count = tl.maximum(tl.sum(tl.where(column == 1, total, 0.0), 0), 1.0)
    tl.store(mean, (tl.sum(tl.where(column == 0, total, 0.0), 0) / count).to(tl.float32))
    tl.store(share, (ranks / count).to(tl.float32))


def anchor_terms(sums: Tensor, bounds: Tensor, formula: Formula) -> tuple[Tensor, Tensor, Tensor | None]:
    """weights, partial and, with the formula's k1, inverse_terms of `_formula_kernel`, of the own rows."""
    splits, _, n = sums.shape
    programs = ceil_div(n, _ANCHORS)
    weights = torch.empty(4, n, dtype=torch.float32, device=sums.device)
    partial = torch.empty(programs, 4, dtype=torch.float64, device=sums.device)
    inverse_terms = torch.empty(programs, dtype=torch.float64, device=sums.device) if formula.inverse else None
    if n:
        _formula_kernel[(programs,)](
            sums, bounds, weights, partial, inverse_terms, n, splits, formula.k1, formula.k2, formula.inside,
            formula.inverse, _ANCHORS,
        )  # fmt: skip
    return weights, partial, inverse_terms


def anchor_mean(partial: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, share, sums) of `_mean_kernel`; partial [programs, 4], or [4]: already added, over `ranks` ranks."""
    sums = torch.empty(4, dtype=torch.float64, device=partial.device)
    mean = torch.empty((), dtype=torch.float32, device=partial.device)
    share = torch.empty((), dtype=torch.float32, device=partial.device)
    _mean_kernel[(1,)](partial, sums, mean, share, partial.numel() // 4, ranks, 256)
    return mean, share, sums
