"""Encoders with fewer channels than their architecture has: layers made narrower by plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import ConfigError


@torch.no_grad()
def set_widths(module: nn.Module, widths: Mapping[str, Sequence[int]]) -> None:
    """Make layers of `module`, by name, as narrow as `widths` says, in place; their first channels stay.

    widths: of a convolution or linear layer, the first two sizes of its weight; of a BatchNorm, its channels: [n].
    Groups of a convolution keep their size; it has fewer of them. Raises ConfigError for an unknown layer, and for
    sizes that are not within the layer's.
    """
    for name, sizes in widths.items():
        try:
            layer: Any = module.get_submodule(name)
        except AttributeError:
            raise ConfigError(f"model.channels: {name}: the encoder has no such layer") from None
        if not isinstance(layer, (_ConvNd, nn.Linear, _BatchNorm)):
            raise ConfigError(f"model.channels: {name}: only convolutions, linear layers and BatchNorm have them")
        own = tuple(layer.weight.shape[:2])
        group = 1
        if isinstance(layer, _ConvNd) and layer.groups > 1:
            group = layer.out_channels // layer.groups
        fits = len(sizes) == len(own) and all(
            isinstance(n, int) and 1 <= n <= limit for n, limit in zip(sizes, own, strict=True)
        )
        if not fits or sizes[0] % group or (isinstance(layer, _ConvNd) and layer.groups > 1 and sizes[1] != own[1]):
            raise ConfigError(f"model.channels: {name}: {list(sizes)} does not fit the layer's {list(own)}")
        _narrow(layer, tuple(sizes), group)


def _narrow(layer: Any, sizes: tuple[int, ...], group: int) -> None:
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if tensor.ndim == 0:  # the counter of batches
            continue
        small = tensor[: sizes[0]]
        if len(sizes) == 2 and tensor.ndim > 1:
            small = small[:, : sizes[1]]
        small = small.clone(memory_format=torch.contiguous_format)
        setattr(layer, name, nn.Parameter(small, tensor.requires_grad) if name in layer._parameters else small)
    if isinstance(layer, _BatchNorm):
        layer.num_features = sizes[0]
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = sizes
    else:
        layer.groups = sizes[0] // group if layer.groups > 1 else 1
        layer.out_channels, layer.in_channels = sizes[0], sizes[1] * layer.groups
