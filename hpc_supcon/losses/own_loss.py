"""Losses of a user's own: plain losses of one process, computed on the embeddings of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.collectives import all_sum, gather_rows, gather_rows_with_grad, gather_sizes, rank, world_size
from ..errors import LossInputError, PartError
from ..parts import Part, run

IMAGES = 4
"""Of the made-up batch on which a loss is tried."""


class OwnLoss(nn.Module):
    """embeddings [B, V, D] and labels [B] of this rank -> the user's loss of those of all ranks, 0-dim.

    The user's module is called with unit rows [N, V, D], N images of all ranks in rank order, and labels int64 [N],
    in float32 (float64 stays) and without autocast; it returns the loss of the batch, 0-dim. It knows nothing of
    ranks: every rank computes the whole loss, and the gather adds the gradients of all of them for a rank's own rows,
    so that their average, which data-parallel training takes, is the gradient of one process with the whole batch. So
    is that of the loss's own parameters. The value is the mean over ranks, for a loss may draw random numbers.
    """

    def __init__(
        self, part: Part, *, options: Mapping[str, Mapping[str, Any]], projection_dim: int, views: int
    ) -> None:
        """options: by the loss's name. The loss is tried on made-up embeddings [IMAGES, views, projection_dim].
        Raises PartError."""
        super().__init__()
        self._where = part.where
        self.module = _module(part, options)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            self._try(_module(part, options), projection_dim, views)

    def forward(
        self, embeddings: Tensor, labels: Tensor | None, *, images_per_rank: list[int] | None = None
    ) -> Tensor:
        """labels: None where no classes are told apart; an image's label is then its number in the global batch.
        images_per_rank: B of every rank, where all know it. Collective. Raises PartError, LossInputError."""
        sizes = images_per_rank or gather_sizes(embeddings)
        if labels is None:
            labels = torch.arange(embeddings.shape[0], device=embeddings.device) + sum(sizes[: rank()])
        with torch.autocast(embeddings.device.type, enabled=False):
            z = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            every, every_label = gather_rows_with_grad(z, sizes), gather_rows(labels.to(z.device, torch.int64), sizes)
            loss = self._checked(run(self._where, self.module, every, every_label))
        if not loss.requires_grad:  # such as a constant, for a batch without positives: a zero that ranks can share
            loss = loss + every.sum() * 0
        ranks = world_size()
        return loss if ranks == 1 else loss + (all_sum(loss) / ranks - loss.detach())

    def _checked(self, loss: Any) -> Tensor:
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            found = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise PartError(
                f"{self._where}: returned {found}, not the loss of the batch, a tensor of no dimension: take the "
                "mean over images"
            )
        return loss

    def _try(self, module: nn.Module, dim: int, views: int) -> None:
        """Raise PartError unless the loss of made-up embeddings depends on them. `module`: one like the loss's own,
        which may keep what it has seen."""
        generator = torch.Generator().manual_seed(0)
        z = F.normalize(torch.randn(IMAGES, views, dim, generator=generator), dim=-1).requires_grad_()
        loss = self._checked(run(self._where, module, z, torch.arange(IMAGES) // 2))
        if not loss.requires_grad:
            raise PartError(
                f"{self._where}: its value does not depend on the embeddings, so nothing would be trained"
            )
        gradient = run(self._where, torch.autograd.grad, loss, z, allow_unused=True)[0]
        if gradient is None:
            raise PartError(
                f"{self._where}: its value does not depend on the embeddings, so nothing would be trained"
            )
        if not torch.isfinite(gradient).all():
            raise LossInputError(f"{self._where}: its gradient is NaN or Inf for made-up embeddings of unit length")


def _module(part: Part, options: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    module = part.build(options.get(part.name))
    if not isinstance(module, nn.Module):
        raise PartError(f"{part.where}: returned {type(module).__name__}, not a torch.nn.Module")
    return module
