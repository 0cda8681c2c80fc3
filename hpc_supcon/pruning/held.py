"""Weights that stay pruned while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .masks import pack, unpack


class WeightMasks:
    """Holds the pruned weights of a module at zero: no parameter is renamed, wrapped or replaced.

    Make it before the module is wrapped for data-parallel training and after it was moved to its device. Masking
    the gradients keeps momentum and gradient norms free of pruned weights; masking the weights after each step
    makes sure of it whatever the optimiser does. Both are one multi-tensor call.
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
        """After an optimiser step: pruned weights are zero."""
        torch._foreach_mul_(self._weights, self._keep)
