"""The module that data-parallel training wraps: all views through one forward pass."""

from __future__ import annotations

from torch import Tensor, nn


class ContrastiveModel(nn.Module):
    """Encoder and projection: views [B, V, C, H, W] -> unit embeddings [B, V, D]."""

    encoder: nn.Module
    projection: nn.Module

    def __init__(self, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection

    def forward(self, views: Tensor) -> Tensor:
        # One pass over all views: two passes would give BatchNorm two sets of statistics.
        z = self.projection(self.encoder(views.flatten(0, 1)))
        return z.unflatten(0, views.shape[:2])
