"""From scores to masks: which weights stay, exactly as many as asked for, the same on every rank and device."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import ConfigError, NonFinite, unknown_name

SCOPES = ("global", "layer")


def prunable(encoder: nn.Module) -> dict[str, Tensor]:
    """Weights of the convolutions and linear layers by name, in the module's order, each once.

    Neither biases nor norms: they are few, and without them a layer cannot make up for what it lost.
    """
    found: dict[str, Tensor] = {}
    for name, module in encoder.named_modules():  # a shared module comes once
        if isinstance(module, (_ConvNd, nn.Linear)) and all(module.weight is not p for p in found.values()):
            found[f"{name}.weight" if name else "weight"] = module.weight
    return found


def build_masks(scores: Mapping[str, Tensor], rate: float, scope: str) -> dict[str, Tensor]:
    """bool masks on the CPU, False where pruned: the round(rate x n) smallest scores (half to even, as torch rounds).

    scope "global": n weights of all tensors together are ranked; "layer": each tensor is by itself. Of equal scores
    those that come first (in the dict's order, row-major within a tensor) are pruned first; where no scores tie the
    masks are those of torch.nn.utils.prune.

    Raises ConfigError for an unknown scope, a rate outside [0, 1), nothing to prune or nothing left; NonFinite for
    scores that cannot be ranked.
    """
    if scope not in SCOPES:
        raise ConfigError("prune.scope: " + unknown_name("scope", scope, SCOPES))
    if not 0 <= rate < 1:
        raise ConfigError(f"prune.rate={rate:g}: the share of weights to prune is 0 or more and below 1")
    if not any(score.numel() for score in scores.values()):
        raise ConfigError("nothing to prune: the encoder has no convolution and no linear layer")
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise NonFinite(f"pruning: scores of {name} are NaN or Inf")
    if scope == "layer":
        masks = {name: _kept(score.flatten().cpu(), rate).view(score.shape) for name, score in scores.items()}
    else:
        kept = _kept(torch.cat([score.flatten().cpu() for score in scores.values()]), rate)
        parts = kept.split([score.numel() for score in scores.values()])
        masks = {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}
    if not any(mask.any() for mask in masks.values()):
        raise ConfigError(f"prune.rate={rate:g} leaves no weight at all: lower it")
    return masks


def _kept(scores: Tensor, rate: float) -> Tensor:
    """bool [n] of scores [n]: False for the round(rate n) smallest, ties by index."""
    n = round(rate * len(scores))
    if n == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    # the n-th smallest value has one answer everywhere; a stable sort, which has as well, takes five times as long
    limit = scores.kthvalue(n).values
    pruned = scores < limit
    tied = (scores == limit).nonzero().flatten()
    pruned[tied[: n - int(pruned.sum())]] = True
    return ~pruned


def emptied(masks: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of which nothing is left."""
    return [name for name, mask in masks.items() if not mask.any()]


def masks_digest(masks: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and bits: equal on two ranks when their masks are."""
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(f"{name} {tuple(mask.shape)} ".encode())
        digest.update(pack(mask).numpy().tobytes())
    return digest.hexdigest()


def pack(mask: Tensor) -> Tensor:
    """bool of any shape -> uint8 [ceil(n / 8)] on the CPU, eight of them a byte, row-major, lowest bit first."""
    return torch.from_numpy(np.packbits(mask.detach().flatten().cpu().numpy(), bitorder="little"))


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`. Raises ValueError where `packed` does not have as many bits."""
    n = int(np.prod(shape, dtype=np.int64))
    if packed.dtype != torch.uint8 or packed.shape != (-(-n // 8),):
        raise ValueError(f"a packed mask of {list(shape)} is uint8 [{-(-n // 8)}], not {list(packed.shape)}")
    bits = np.unpackbits(packed.cpu().numpy(), count=n, bitorder="little")
    return torch.from_numpy(bits).bool().view(shape)
