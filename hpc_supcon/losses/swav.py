"""SwAV: a view predicts the assignment of another view to prototypes, which the images of a batch share equally."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.collectives import all_sum
from .pairwise import global_mean
from .validation import prepare_anchors


class SwAVLoss(nn.Module):
    """-sum over prototypes k of q_k log softmax_k(z'.c / tau), q the code of view z, the mean over pairs of views.

    Caron et al. 2020 (arXiv 2006.09882), equation 2, without a queue and without crops of a second size. Embeddings z
    and prototypes c have unit length. Codes are those of `sinkhorn` over the images of all ranks, and constants for
    the gradient. The value is between 0 and about log K + 2 / tau.

    `prototypes` [K, D] are trained; only their directions count. Their gradient is 0 in the first `frozen_steps`
    steps, which `steps` counts.
    """

    steps: Tensor

    def __init__(
        self,
        temperature: float = 0.1,
        prototypes: int = 3000,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        *,
        projection_dim: int = 128,
        frozen_steps: int = 0,
        seed: int = 0,
        validate: bool = True,
    ) -> None:
        """`seed`: of the initial prototypes."""
        super().__init__()
        self.temperature, self.frozen_steps, self.validate = temperature, frozen_steps, validate
        self.sinkhorn_epsilon, self.sinkhorn_iterations = sinkhorn_epsilon, sinkhorn_iterations
        generator = torch.Generator().manual_seed(seed)
        self.prototypes = nn.Parameter(
            F.normalize(torch.randn(prototypes, projection_dim, generator=generator), dim=1)
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, embeddings: Tensor, images_per_rank: list[int] | None = None) -> Tensor:
        """[B, V, D], V >= 2 -> 0-dim loss, the same on every rank. Every rank must call this.

        `images_per_rank`: B of every rank, where all ranks know it. Raises LossInputError.
        """
        views = embeddings.shape[1] if embeddings.ndim == 3 else 1
        rows_per_rank = None if images_per_rank is None else [n * views for n in images_per_rank]
        prepare_anchors(embeddings, None, validate=self.validate, rows_per_rank=rows_per_rank)
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
            trained = (self.steps >= self.frozen_steps).to(dtype)  # no branch: the host would wait for the device
            prototypes = self.prototypes.to(dtype)
            prototypes = prototypes.detach() + (prototypes - prototypes.detach()) * trained
            scores = F.normalize(embeddings.to(dtype), dim=-1) @ F.normalize(prototypes, dim=1).T  # [B, V, K]
            codes = [sinkhorn(s, self.sinkhorn_epsilon, self.sinkhorn_iterations) for s in scores.unbind(1)]
            codes_BVK, logs_BVK = torch.stack(codes, dim=1), F.log_softmax(scores / self.temperature, dim=-1)
            # all pairs of views, less those of a view with itself
            sums = (codes_BVK.sum(1) * logs_BVK.sum(1)).sum(-1) - (codes_BVK * logs_BVK).sum((1, 2))
            per_image = -sums / (views * (views - 1))
            return global_mean(per_image, torch.ones_like(per_image, dtype=torch.bool))

    @torch.no_grad()
    def after_step(self, outputs: Mapping[str, Tensor], images_per_rank: list[int] | None = None) -> None:
        """Count a step."""
        self.steps += 1


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes [B, K] of scores [B, K] in -1..1: rows that sum to 1, and columns with about equal sums over all ranks.

    exp(scores / epsilon), whose columns and rows are scaled to equal sums in turn (Cuturi 2013; Caron et al. 2020,
    section 3.1). Every rank must call this.
    """
    q = ((scores.double() - 1) / epsilon).exp_()
    for _ in range(iterations):
        q /= all_sum(q.sum(0))
        q /= q.sum(1, keepdim=True)
    return q.to(scores.dtype)
