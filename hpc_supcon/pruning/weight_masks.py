"""Masks of pruned weights: applied to a module during training, packed for checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


class WeightMasks:
    """Keeps the pruned weights of a module at zero, without renaming, wrapping or replacing a parameter.

    Create it after the module was moved to its device and before it is wrapped for data-parallel training. Masking
    the gradients keeps pruned weights out of momentum and gradient norms; masking the weights after each step keeps
    them at zero whatever the optimizer does. Each is one multi-tensor call.
    """

    def __init__(self, module: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """masks: parameter name -> bool of its shape, False where pruned; those weights are set to zero.

        Raises KeyError for an unknown name, ValueError for another shape.
        """
        parameters = dict(module.named_parameters())
        self._packed = {name: pack(mask) for name, mask in masks.items()}
        self._weights: list[Tensor] = [parameters[name] for name in masks]
        self._keep: list[Tensor] = []
        for (name, mask), weight in zip(masks.items(), self._weights, strict=True):
            if mask.shape != weight.shape:
                raise ValueError(f"mask of {name} is {list(mask.shape)}, the weight {list(weight.shape)}")
            # in the weight's own dtype and memory layout, which multi-tensor kernels require
            self._keep.append(torch.empty_like(weight.detach()).copy_(mask))
            # not a product, which may give -0.0: sparse files leave out only +0
            weight.detach().masked_fill_(~mask.to(weight.device), 0.0)

    @classmethod
    def from_packed(cls, module: nn.Module, packed: Mapping[str, Tensor]) -> WeightMasks:
        """From the result of `packed`. Raises KeyError, ValueError if it is of another module."""
        parameters = dict(module.named_parameters())
        return cls(module, {name: unpack(bits, tuple(parameters[name].shape)) for name, bits in packed.items()})

    def packed(self) -> dict[str, Tensor]:
        """The masks by parameter name, eight weights per byte (see `pack`): for a checkpoint."""
        return self._packed

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Call after backward: sets the gradients of pruned weights to zero."""
        pairs = [(w.grad, keep) for w, keep in zip(self._weights, self._keep, strict=True) if w.grad is not None]
        if pairs:
            torch._foreach_mul_([grad for grad, _ in pairs], [keep for _, keep in pairs])

    @torch.no_grad()
    def apply_to_weights(self) -> None:
        """Call after an optimizer step: sets pruned weights to zero."""
        torch._foreach_mul_(self._weights, self._keep)


def prunable(encoder: nn.Module) -> dict[str, Tensor]:
    """Weights of the convolutions and linear layers by name, in the module's order, each once.

    Biases and norms are not included: they are few, and a pruned layer needs them to compensate for lost weights.
    """
    found: dict[str, Tensor] = {}
    for name, module in encoder.named_modules():  # yields a shared module once
        if isinstance(module, (_ConvNd, nn.Linear)) and all(module.weight is not p for p in found.values()):
            found[f"{name}.weight" if name else "weight"] = module.weight
    return found


def masks_digest(masks: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes and bits: equal for equal masks."""
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(f"{name} {tuple(mask.shape)} ".encode())
        digest.update(pack(mask).numpy().tobytes())
    return digest.hexdigest()


def pack(mask: Tensor) -> Tensor:
    """bool of any shape -> uint8 [ceil(n / 8)] on the CPU: eight values per byte, row-major, lowest bit first."""
    return torch.from_numpy(np.packbits(mask.detach().flatten().cpu().numpy(), bitorder="little"))


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`. Raises ValueError if `packed` is not of a mask of this shape."""
    n = int(np.prod(shape, dtype=np.int64))
    if packed.dtype != torch.uint8 or packed.shape != (-(-n // 8),):
        raise ValueError(f"a packed mask of {list(shape)} is uint8 [{-(-n // 8)}], not {list(packed.shape)}")
    bits = np.unpackbits(packed.cpu().numpy(), count=n, bitorder="little")
    return torch.from_numpy(bits).bool().view(shape)
