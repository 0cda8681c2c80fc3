"""DINO: every view predicts to which prototypes the momentum teacher assigns a global view of its image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.collectives import all_sum, gather_sizes
from .pairwise import global_mean
from .prototypes import random_prototypes, unit_prototypes
from .validation import prepare_views


class DINOLoss(nn.Module):
    """-sum over k of softmax_k((t - center) / tau_t) log softmax_k(s / tau), the mean over pairs of views and images.

    t = z_t.c_t are the scores of the teacher for a global view, s = z.c those of the student for another view of the
    image; embeddings z and prototypes c have unit length (Caron et al. 2021, arXiv 2104.14294, equation 1 and
    algorithm 1). No gradient reaches the teacher. The value is between 0 and about log K + 2 / tau. After a call,
    `stats` holds the mean entropy of the teacher's assignments, `teacher_entropy`: near 0 where all images have
    collapsed to one prototype, near log K where all assignments are uniform.

    `prototypes` [K, D], the student's last layer, are trained; only their directions count. Their gradient is 0 in
    the first `frozen_steps` steps, which `steps` counts. `teacher_prototypes` are their moving average (see
    `followers`). `center` [K] is the moving average, by `center_momentum`, of the teacher's mean score over the
    images of all ranks (equation 4). The teacher's temperature rises, in equal steps from epoch to epoch, from
    `teacher_warmup_temperature` to `teacher_temperature` in the last one of `teacher_warmup_epochs`.
    """

    steps: Tensor
    center: Tensor
    teacher_prototypes: Tensor

    def __init__(
        self,
        temperature: float = 0.1,
        prototypes: int = 65536,
        teacher_temperature: float = 0.07,
        teacher_warmup_temperature: float = 0.04,
        teacher_warmup_epochs: int = 30,
        center_momentum: float = 0.9,
        *,
        projection_dim: int = 256,
        frozen_steps: int = 0,
        steps_per_epoch: int = 1,
        seed: int = 0,
        validate: bool = True,
    ) -> None:
        """`temperature`: tau, the student's. `seed`: of the initial prototypes."""
        super().__init__()
        self.temperature, self.frozen_steps, self.validate = temperature, frozen_steps, validate
        self.teacher_temperature, self.teacher_warmup_temperature = teacher_temperature, teacher_warmup_temperature
        self.teacher_warmup_epochs, self.steps_per_epoch = teacher_warmup_epochs, steps_per_epoch
        self.center_momentum = center_momentum
        self.prototypes = random_prototypes(prototypes, projection_dim, seed)
        self.register_buffer("teacher_prototypes", self.prototypes.detach().clone())
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.stats: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, target: Tensor, images_per_rank: list[int] | None = None) -> Tensor:
        """[B, V, D], V >= 2, and the teacher's [B, G, D] of the first G views -> 0-dim loss, the same on every rank.

        Every rank must call this. `images_per_rank`: B of every rank, where all ranks know it. Raises LossInputError.
        """
        views, dtype, _ = prepare_views(embeddings, images_per_rank, validate=self.validate)
        with torch.autocast(embeddings.device.type, enabled=False):
            assigned = self._assignments(target.detach().to(dtype))  # [B, G, K]
            prototypes = unit_prototypes(self.prototypes, trained=self.steps >= self.frozen_steps, dtype=dtype)
            logits = F.normalize(embeddings.to(dtype), dim=-1) @ prototypes.T / self.temperature  # [B, V, K]
            given = assigned.shape[1]
            # the cross-entropy of a pair is lse - assigned.logits: all pairs, less those of a view with itself
            lse = torch.logsumexp(logits, dim=-1)
            lses = given * lse.sum(1) - lse[:, :given].sum(1)
            dots = (assigned.sum(1) * logits.sum(1)).sum(-1) - (assigned * logits[:, :given]).sum((1, 2))
            per_image = (lses - dots) / (given * (views - 1))
            everyone = torch.ones_like(per_image, dtype=torch.bool)
            entropy = torch.special.entr(assigned).sum(-1).mean(1)
            self.stats = {"teacher_entropy": global_mean(entropy, everyone).detach()}
            return global_mean(per_image, everyone)

    @torch.no_grad()
    def _assignments(self, target: Tensor) -> Tensor:
        """The teacher's embeddings [B, G, D] -> its assignments [B, G, K], which sum to 1."""
        scores = F.normalize(target, dim=-1) @ F.normalize(self.teacher_prototypes.to(target.dtype), dim=1).T
        return torch.softmax((scores - self.center.to(target.dtype)) / self._teacher_temperature(), dim=-1)

    def _teacher_temperature(self) -> Tensor:
        """0-dim float64, of the step that comes next; on the device, for the host would wait for `steps`."""
        start, end = self.teacher_warmup_temperature, self.teacher_temperature
        epoch = self.steps // self.steps_per_epoch
        risen = (epoch.double() / max(self.teacher_warmup_epochs - 1, 1)).clamp(max=1.0)
        return torch.where(epoch < self.teacher_warmup_epochs, start + (end - start) * risen, end)

    def followers(self) -> list[tuple[Tensor, Tensor]]:
        """(moving average, weights) of what belongs to the momentum target beside its network."""
        return [(self.teacher_prototypes, self.prototypes)]

    @torch.no_grad()
    def after_step(self, outputs: Mapping[str, Tensor], images_per_rank: list[int] | None = None) -> None:
        """Count a step; move the center towards the mean score of outputs["target"] [B, G, D] of all ranks.

        Call it before the followers are moved. Collective.
        """
        self.steps += 1
        z = F.normalize(outputs["target"].to(self.center.dtype), dim=-1)
        images = sum(gather_sizes(z) if images_per_rank is None else images_per_rank)
        # scores are linear in the embeddings: the mean of scores is the score of the mean
        mean = all_sum(z.sum((0, 1))) / (images * z.shape[1])
        score = F.normalize(self.teacher_prototypes, dim=1) @ mean
        self.center.lerp_(score, 1 - self.center_momentum)
