"""A queue of past embeddings, made by a slowly following copy of the model (He et al. 2020, MoCo), with labels."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..distributed.collectives import gather_rows
from ..models import PretrainingModel
from .ema import follow


class MomentumQueue(nn.Module):
    """The newest `size` keys of all ranks, equal on every rank: extra columns of the loss, without gradient.

    Keys are projections of each image's first view by a copy of the model whose weights follow as
    copy = m copy + (1 - m) model (`momentum` m), or by the model itself when `momentum` is None.
    """

    features: Tensor
    labels: Tensor
    pushed: Tensor

    def __init__(self, model: PretrainingModel, size: int, dim: int, momentum: float | None) -> None:
        super().__init__()
        self.momentum = momentum
        self.key_model = copy.deepcopy(model).requires_grad_(False) if momentum is not None else None
        device = next(model.parameters()).device
        self.register_buffer("features", torch.zeros(size, dim, device=device))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64, device=device))
        # keys pushed since the start, on the CPU: the ring's position is this modulo its size
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def columns(self) -> tuple[Tensor, Tensor] | None:
        """(features [k, D], labels [k]) of the keys held, None before the first push."""
        held = min(int(self.pushed), len(self.labels))
        return (self.features[:held], self.labels[:held]) if held else None

    @torch.no_grad()
    def keys(self, views: Tensor, outputs: Tensor) -> Tensor:
        """Keys [B, D] of views [B, V, C, H, W], of which `outputs` [B, V, D] are the model's projections."""
        if self.key_model is None:
            return outputs[:, 0].detach().float()
        return self.key_model(views[:, :1])["projection"][:, 0].float()

    @torch.no_grad()
    def push(self, keys: Tensor, labels: Tensor, images_per_rank: list[int] | None = None) -> None:
        """Put the keys [B, D] of all ranks in the place of the oldest ones. Collective.

        images_per_rank: B of every rank, where it is known (saves a message and a wait for the device).
        """
        keys, labels = gather_rows(keys, images_per_rank), gather_rows(labels, images_per_rank)
        size = len(self.labels)
        start = int(self.pushed) + max(0, len(keys) - size)
        keys, labels = keys[-size:], labels[-size:]
        places = torch.arange(start, start + len(keys), device=keys.device).remainder(size)
        self.features.index_copy_(0, places, keys)
        self.labels.index_copy_(0, places, labels)
        self.pushed.fill_(start + len(keys))

    def follow(self, model: nn.Module) -> None:
        """Move the copy's weights towards the model's; its BatchNorm statistics are its own."""
        if self.key_model is not None and self.momentum is not None:
            follow(self.key_model.parameters(), model.parameters(), self.momentum)
