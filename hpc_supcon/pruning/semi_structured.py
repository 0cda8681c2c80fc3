"""2:4 sparse layers on the tensor cores of a GPU, by PyTorch's semi-structured tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .selection import misfits

MIN_CAPABILITY = (8, 0)
_MULTIPLE = 64
"""Both sides of a matrix must be a multiple of this, for every kernel and half-precision format."""


class PointwiseConv2d(nn.Module):
    """A 1x1 convolution as a product with the matrix `weight` [out, in], which may be sparse: convolutions take no
    sparse weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        n, height, width, channels = rows.shape
        out = F.linear(rows.reshape(-1, channels), self.weight, self.bias)
        return out.view(n, height, width, -1).permute(0, 3, 1, 2)


def to_semi_structured(module: nn.Module) -> tuple[list[str], str | None]:
    """Convert the layers of `module`, in place, that are pruned 2:4: for inference in half precision on a GPU.

    Linear layers, and 1x1 convolutions without stride, padding or groups, whose weight has at most 2 of every 4
    weights along the input, in float16 or bfloat16, with both sides multiples of 64. Returns (names of the layers
    converted, why none can be on this device; None: they can). Nothing is changed where the device does not allow it:
    CUDA of compute capability 8.0 or higher.
    """
    device = next(module.parameters()).device
    if device.type != "cuda":
        return [], f"2:4 kernels need an NVIDIA GPU; the weights are on the device {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        return [], f"2:4 kernels need compute capability 8.0; this GPU has {capability[0]}.{capability[1]}"
    from torch.sparse import to_sparse_semi_structured

    converted = []
    for name, layer in list(module.named_modules()):
        weight = matrix_of(layer)
        if weight is None or not has_kernels(weight) or not is_two_of_four(weight):
            continue
        sparse = to_sparse_semi_structured(weight.detach().contiguous())
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(sparse, requires_grad=False)
        else:
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, PointwiseConv2d(sparse, layer.bias))
        converted.append(name)
    return converted, None


def matrix_of(layer: nn.Module) -> Tensor | None:
    """The weight [out, in] of a linear layer or of a 1x1 convolution that is a product at each pixel, else None."""
    if isinstance(layer, nn.Linear):
        return layer.weight
    plain = ((1, 1), (1, 1), 1)
    if isinstance(layer, nn.Conv2d) and (layer.kernel_size, layer.stride, layer.groups) == plain:
        return layer.weight.flatten(1) if layer.padding in ((0, 0), "valid", 0) else None
    return None


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most 2 of every 4 consecutive weights along dimension 1 are not zero."""
    if misfits({"": weight}, 4):
        return False
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all())


def has_kernels(weight: Tensor) -> bool:
    """Whether PyTorch has a 2:4 kernel for a matrix of this dtype and size."""
    sizes = all(side % _MULTIPLE == 0 for side in weight.shape)
    return weight.dtype in (torch.float16, torch.bfloat16) and sizes
