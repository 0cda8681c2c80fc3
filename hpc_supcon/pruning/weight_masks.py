"""Masks of pruned weights: from scores to masks, and a module's weights held at zero by them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import ConfigError, NonFinite, unknown_name


class WeightMasks:
    """Holds the pruned weights of a module at zero: no parameter is renamed, wrapped or replaced.

    Make it before the module is wrapped for data-parallel training and after it was moved to its device. Masking
    the gradients keeps momentum and gradient norms free of pruned weights; masking the weights after each step
    makes sure of it whatever the optimizer does. Both are one multi-tensor call.
    """

    def __init__(self, module: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """`masks`: parameter's name -> bool of its shape, False where pruned; those weights become zero here.

        Raises KeyError for an unknown name, ValueError for another shape.
        """
        own = dict(module.named_parameters())
        self._packed = {name: pack(mask) for name, mask in masks.items()}
        self._weights: list[Tensor] = [own[name] for name in masks]
        self._keep: list[Tensor] = []
        for (name, mask), weight in zip(masks.items(), self._weights, strict=True):
            if mask.shape != weight.shape:
                raise ValueError(f"mask of {name} is {list(mask.shape)}, the weight {list(weight.shape)}")
            # in the weight's own type and memory layout, which multi-tensor kernels ask for
            self._keep.append(torch.empty_like(weight.detach()).copy_(mask))
            # not a product: -0.0 is no zero to a file that compares bits
            weight.detach().masked_fill_(~mask.to(weight.device), 0.0)

    @classmethod
    def unpacked(cls, module: nn.Module, packed: Mapping[str, Tensor]) -> WeightMasks:
        """From what `packed` returned. Raises KeyError, ValueError where it is of another module."""
        own = dict(module.named_parameters())
        return cls(module, {name: unpack(bits, tuple(own[name].shape)) for name, bits in packed.items()})

    def packed(self) -> dict[str, Tensor]:
        """Eight weights a byte by parameter's name: for a checkpoint (see masks.pack)."""
        return self._packed

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """After backward: pruned weights have no gradient."""
        pairs = [(w.grad, keep) for w, keep in zip(self._weights, self._keep, strict=True) if w.grad is not None]
        if pairs:
            torch._foreach_mul_([grad for grad, _ in pairs], [keep for _, keep in pairs])

    @torch.no_grad()
    def apply_to_weights(self) -> None:
        """After an optimizer step: pruned weights are zero."""
        torch._foreach_mul_(self._weights, self._keep)


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
