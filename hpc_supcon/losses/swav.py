"""SwAV: a view predicts the assignment of another view to prototypes, which the images of a batch share equally."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.collectives import all_sum, gather_rows
from .pairwise import global_mean
from .prototypes import random_prototypes, unit_prototypes
from .validation import prepare_views


class SwAVLoss(nn.Module):
    """-sum over prototypes k of q_k log softmax_k(z'.c / tau), q the code of a global view z, z' another view.

    The mean over global views and the other views of their images (Caron et al. 2020, arXiv 2006.09882, equation 2
    and section 3.2). Embeddings z and prototypes c have unit length. Codes are those of `sinkhorn` over the images of
    all ranks, and constants for the gradient. The value is between 0 and about log K + 2 / tau.

    `prototypes` [K, D] are trained; only their directions count. Their gradient is 0 in the first `frozen_steps`
    steps, which `steps` counts. `queue` [G, queue_size, D], where there is one, has the newest embeddings of each
    global view of all ranks, the newest first; from step `queue_start_steps` on, and once it is full, these images
    share the prototypes with those of the batch.
    """

    steps: Tensor
    queue: Tensor | None

    def __init__(
        self,
        temperature: float = 0.1,
        prototypes: int = 3000,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        queue_size: int = 0,
        *,
        projection_dim: int = 128,
        global_views: int = 2,
        frozen_steps: int = 0,
        queue_start_steps: int = 0,
        seed: int = 0,
        validate: bool = True,
    ) -> None:
        """`global_views`: G, the first views of each image; `seed`: of the initial prototypes."""
        super().__init__()
        self.temperature, self.validate, self.global_views = temperature, validate, global_views
        self.frozen_steps, self.queue_start_steps = frozen_steps, queue_start_steps
        self.sinkhorn_epsilon, self.sinkhorn_iterations = sinkhorn_epsilon, sinkhorn_iterations
        self.prototypes = random_prototypes(prototypes, projection_dim, seed)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue", torch.zeros(global_views, queue_size, projection_dim) if queue_size else None)

    def forward(self, embeddings: Tensor, images_per_rank: list[int] | None = None) -> Tensor:
        """[B, V, D], V >= 2, V >= G -> 0-dim loss, the same on every rank. Every rank must call this.

        `images_per_rank`: B of every rank, where all ranks know it. Raises LossInputError.
        """
        views, dtype, _ = prepare_views(embeddings, images_per_rank, validate=self.validate)
        with torch.autocast(embeddings.device.type, enabled=False):
            prototypes = unit_prototypes(self.prototypes, trained=self.steps >= self.frozen_steps, dtype=dtype)
            scores = F.normalize(embeddings.to(dtype), dim=-1) @ prototypes.T  # [B, V, K]
            codes = [self._codes(scores[:, g], prototypes, g) for g in range(self.global_views)]
            codes_BGK, logs_BVK = torch.stack(codes, dim=1), F.log_softmax(scores / self.temperature, dim=-1)
            # all pairs of a global view and a view, less those of a view with itself
            sums = (codes_BGK.sum(1) * logs_BVK.sum(1)).sum(-1)
            sums = sums - (codes_BGK * logs_BVK[:, : self.global_views]).sum((1, 2))
            per_image = -sums / (self.global_views * (views - 1))
            return global_mean(per_image, torch.ones_like(per_image, dtype=torch.bool))

    @torch.no_grad()
    def _codes(self, scores: Tensor, prototypes: Tensor, view: int) -> Tensor:
        """Codes [B, K] of a global view with these scores [B, K]. Collective."""
        past = used = None
        if self.queue is not None:
            past = self.queue[view].to(scores.dtype) @ prototypes.T
            # no branch, for which the host would wait; rows of a queue that is not full are 0
            used = (self.steps >= self.queue_start_steps) & self.queue[view, -1].any()
        return sinkhorn(scores, self.sinkhorn_epsilon, self.sinkhorn_iterations, past=past, used=used)

    @torch.no_grad()
    def after_step(self, outputs: Mapping[str, Tensor], images_per_rank: list[int] | None = None) -> None:
        """Count a step; replace the oldest of the queue by outputs["projection"] [B, V, D] of all ranks.

        Collective.
        """
        self.steps += 1
        if self.queue is not None:
            own = F.normalize(outputs["projection"][:, : self.global_views].to(self.queue.dtype), dim=-1)
            newest = gather_rows(own, images_per_rank).transpose(0, 1)
            self.queue.copy_(torch.cat([newest, self.queue], dim=1)[:, : self.queue.shape[1]])


@torch.no_grad()
def sinkhorn(
    scores: Tensor, epsilon: float, iterations: int, *, past: Tensor | None = None, used: Tensor | None = None
) -> Tensor:
    """Codes [B, K] of scores [B, K] in -1..1: rows that sum to 1, and columns with about equal sums over all ranks.

    exp(scores / epsilon), whose columns and rows are scaled to equal sums in turn (Cuturi 2013; Caron et al. 2020,
    section 3.1). past: scores [Q, K] of images that share the columns, equal on every rank, where `used` (0-dim bool)
    is True. Every rank must call this.
    """
    q = ((scores.double() - 1) / epsilon).exp_()
    more = None if past is None or used is None else ((past.double() - 1) / epsilon).exp_() * used
    for _ in range(iterations):
        shares = all_sum(q.sum(0))
        if more is not None:
            shares = shares + more.sum(0)
            more = more / shares
            more /= more.sum(1, keepdim=True).clamp(min=torch.finfo(more.dtype).tiny)
        q /= shares
        q /= q.sum(1, keepdim=True)
    return q.to(scores.dtype)
