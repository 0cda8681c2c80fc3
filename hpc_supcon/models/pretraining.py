"""The module that data-parallel training wraps: all views through one forward pass, then every head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class PretrainingModel(nn.Module):
    """An encoder with named heads: views [B, V, C, H, W] -> {head: its output [B, V, ...]}."""

    encoder: nn.Module

    def __init__(self, encoder: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        # One pass over all views: two passes would give BatchNorm two sets of statistics.
        features = self.encoder(views.flatten(0, 1))
        return {name: head(features).unflatten(0, views.shape[:2]) for name, head in self.heads.items()}
