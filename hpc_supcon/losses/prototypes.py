"""Prototypes that embeddings are compared with: the last layer of SwAV and DINO, of which only directions count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def random_prototypes(count: int, dim: int, seed: int) -> nn.Parameter:
    """[count, dim]: rows of unit length in random directions, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(F.normalize(torch.randn(count, dim, generator=generator), dim=1))


def unit_prototypes(prototypes: Tensor, *, trained: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, D] of unit length, as a layer with weight normalization has them whose scale is fixed at 1.

    trained: 0-dim bool; where it is False the gradient is 0. That is no branch, for which the host would wait.
    """
    values = prototypes.to(dtype)
    values = values.detach() + (values - values.detach()) * trained.to(dtype)
    return F.normalize(values, dim=1)
