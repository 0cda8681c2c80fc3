"""From scores to masks: which weights are pruned at a rate, of all layers together, of each layer, or N of M."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ConfigError, NonFinite, unknown_name

SCOPES = ("global", "layer")
"""Values of `prune.scope` besides the patterns N:M."""


def build_masks(
    scores: Mapping[str, Tensor],
    rate: float,
    scope: str | tuple[int, int],
    *,
    pruned: Mapping[str, Tensor] | None = None,
    counts: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """bool masks on the CPU, False where pruned: the round(rate x n) smallest scores (half to even, as torch rounds).

    scope "global": all tensors are ranked together; "layer": each tensor by itself; n is the number of scores ranked
    together. (N, M): N of every M are kept whatever the rate, see `pattern_masks`. Among equal scores the first ones
    (in the dict's order, row-major within a tensor) are pruned. Without ties the masks are those of
    torch.nn.utils.prune. pruned: masks of weights pruned before, which count and stay pruned, also where they are
    more than the rate. counts: number of weights to prune in each tensor, in place of rate and scope.

    Raises ConfigError for an unknown scope, a rate outside [0, 1), nothing to prune or nothing left; NonFinite for
    scores that cannot be ranked.
    """
    if not isinstance(scope, tuple) and scope not in SCOPES:
        raise ConfigError("prune.scope: " + unknown_name("scope", scope, SCOPES))
    if not 0 <= rate < 1:
        raise ConfigError(f"prune.rate={rate:g}: the fraction of weights to prune must be at least 0 and below 1")
    if not any(score.numel() for score in scores.values()):
        raise ConfigError("nothing to prune: the encoder has no convolution and no linear layer")
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise NonFinite(f"pruning: scores of {name} are NaN or Inf")
    ranked = {name: score.detach().cpu() for name, score in scores.items()}
    if pruned is not None:
        ranked = {name: score.masked_fill(~pruned[name], -torch.inf) for name, score in ranked.items()}
    if isinstance(scope, tuple):
        masks = pattern_masks(ranked, *scope)
    elif counts is not None:
        masks = {name: _keep(score, counts[name]) for name, score in ranked.items()}
    elif scope == "layer":
        masks = {name: _keep(score, round(rate * score.numel())) for name, score in ranked.items()}
    else:
        flat = torch.cat([score.flatten() for score in ranked.values()])
        kept = _keep(flat, round(rate * len(flat))).split([score.numel() for score in ranked.values()])
        masks = {name: part.view(ranked[name].shape) for name, part in zip(ranked, kept, strict=True)}
    if not any(mask.any() for mask in masks.values()):
        raise ConfigError(f"prune.rate={rate:g} leaves no weight at all: lower it")
    return masks


def _keep(scores: Tensor, n: int) -> Tensor:
    """`keep_mask` of scores of any shape; those pruned before (-inf) are at least pruned again."""
    flat = scores.flatten()
    return keep_mask(flat, max(n, int((flat == -torch.inf).sum()))).view(scores.shape)


def keep_mask(scores: Tensor, n: int) -> Tensor:
    """bool [len] of scores [len]: False for the n smallest; ties are pruned in order of their index."""
    if n == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    # kthvalue gives the same result on every rank and device; so does a stable sort, but it takes five times as long
    limit = scores.kthvalue(n).values
    pruned = scores < limit
    tied = (scores == limit).nonzero().flatten()
    pruned[tied[: n - int(pruned.sum())]] = True
    return ~pruned


def pattern_masks(scores: Mapping[str, Tensor], n: int, m: int) -> dict[str, Tensor]:
    """Masks that keep the `n` largest of every `m` consecutive scores along the input dimension (N:M sparsity).

    The input dimension of a weight [out, in, ...] is 1: the inputs of a linear layer, and the channels of a
    convolution at each kernel position, as in NVIDIA's ASP (Mishra et al. 2021, arXiv 2104.08378). Among equal
    scores the first are pruned; -inf is pruned in any case. Tensors that do not fit (see `misfits`) are left as they
    are. Raises ConfigError where none fits.
    """
    skipped = misfits(scores, m)
    if len(skipped) == len(scores):
        raise ConfigError(f"prune.scope={n}:{m}: no layer has a number of input channels that {m} divides")
    masks = {}
    for name, score in scores.items():
        mask = torch.ones_like(score, dtype=torch.bool)
        if name not in skipped:
            groups = score.movedim(1, -1).unflatten(-1, (-1, m))
            smallest = groups.argsort(dim=-1, stable=True)[..., : m - n]
            grouped = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, smallest, False)
            mask = grouped.flatten(-2).movedim(-1, 1).contiguous()
        masks[name] = mask & (score != -torch.inf)
    return masks


def misfits(weights: Mapping[str, Tensor], m: int) -> list[str]:
    """Names of the weights whose number of inputs (input channels per group of a convolution) `m` does not divide."""
    return [name for name, weight in weights.items() if weight.ndim < 2 or weight.shape[1] % m]


def fully_pruned(masks: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of which no weight is left."""
    return [name for name, mask in masks.items() if not mask.any()]
