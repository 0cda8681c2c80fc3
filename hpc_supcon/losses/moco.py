"""MoCo: every view is compared with the momentum target's key of another view, and with a queue of past keys."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.collectives import gather_rows
from .pairwise import global_mean
from .validation import prepare_views


class MoCoLoss(nn.Module):
    """-log(exp(q.k / tau) / (exp(q.k / tau) + sum over the queue of exp(q.k' / tau))), over all ranks.

    q is the embedding of a view, k the key of another view of its image, both of unit length; the keys come from the
    momentum target and are constants for the gradient (He et al. 2020, arXiv 1911.05722, equation 1; Chen et al.
    2020, arXiv 2003.04297). The mean over all pairs of views: each view is a query, as in MoCo v3 and solo-learn's
    MoCo v2+. Keys of the same batch are not negatives.

    `keys` [V, queue_size, D] holds the newest keys of each view of all ranks, the newest first; at the start random
    rows of unit length, equal on every rank.
    """

    keys: Tensor

    def __init__(
        self,
        temperature: float = 0.2,
        queue_size: int = 32768,
        *,
        projection_dim: int = 128,
        views: int = 2,
        seed: int = 0,
        validate: bool = True,
    ) -> None:
        """`seed`: of the queue's first rows."""
        super().__init__()
        self.temperature, self.validate = temperature, validate
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(views, queue_size, projection_dim, generator=generator)
        self.register_buffer("keys", F.normalize(random, dim=-1))

    def forward(self, embeddings: Tensor, keys: Tensor, images_per_rank: list[int] | None = None) -> Tensor:
        """[B, V, D] each -> 0-dim loss, the same on every rank. Every rank must call this.

        `keys`: of the momentum target, for the same views. `images_per_rank`: B of every rank, where all ranks know
        it. Raises LossInputError.
        """
        views, dtype, _ = prepare_views(embeddings, images_per_rank, validate=self.validate)
        with torch.autocast(embeddings.device.type, enabled=False):
            q = F.normalize(embeddings.to(dtype), dim=-1)
            k = F.normalize(keys.detach().to(dtype), dim=-1)
            losses = [
                self._info_nce(q[:, a], k[:, b], self.keys[b].to(dtype)) for a, b in permutations(range(views), 2)
            ]
            per_image = torch.stack(losses).mean(0)
            return global_mean(per_image, torch.ones_like(per_image, dtype=torch.bool))

    def _info_nce(self, queries: Tensor, keys: Tensor, negatives: Tensor) -> Tensor:
        """[B, D], [B, D], [Q, D] -> [B]."""
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ negatives.T], dim=1) / self.temperature
        return torch.logsumexp(logits, dim=1) - logits[:, 0]

    @torch.no_grad()
    def after_step(self, outputs: Mapping[str, Tensor], images_per_rank: list[int] | None = None) -> None:
        """Replace the oldest keys by outputs["target"] [B, V, D] of all ranks. Collective."""
        newest = gather_rows(F.normalize(outputs["target"].float(), dim=-1), images_per_rank)
        self.keys.copy_(torch.cat([newest.transpose(0, 1), self.keys], dim=1)[:, : self.keys.shape[1]])
