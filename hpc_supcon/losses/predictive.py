"""Losses that predict the embedding of one view of an image from another one, without negatives: SimSiam and BYOL."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pairwise import global_mean
from .validation import prepare_views


class SimSiamLoss(nn.Module):
    """-cosine(prediction of a view, embedding of another view), the mean over pairs of views and images of all ranks.

    The embedding is a constant for the gradient (Chen and He 2021, arXiv 2011.10566, equations 2 and 4). The value
    is between -1 and 1, and -1 also where all embeddings are equal: see `embedding_std` in the log.
    """

    def __init__(self, *, validate: bool = True) -> None:
        super().__init__()
        self.validate = validate

    def forward(self, prediction: Tensor, embeddings: Tensor, images_per_rank: list[int] | None = None) -> Tensor:
        """[B, V, D] each, V >= 2, of any length -> 0-dim loss, the same on every rank. Every rank must call this.

        `images_per_rank`: B of every rank, where all ranks know it. Raises LossInputError.
        """
        return -mean_cosine(prediction, embeddings, images_per_rank, validate=self.validate)


class BYOLLoss(nn.Module):
    """|p - z'|^2 + |p' - z|^2 of the predictions p and the momentum target's embeddings z, scaled to unit length.

    The mean over the images of all ranks (Grill et al. 2020, arXiv 2006.07733, equation 2 and the symmetric loss
    below it); with more than two views, twice the mean over pairs. The value is between 0 and 8.
    """

    def __init__(self, *, validate: bool = True) -> None:
        super().__init__()
        self.validate = validate

    def forward(self, prediction: Tensor, target: Tensor, images_per_rank: list[int] | None = None) -> Tensor:
        """As SimSiamLoss."""
        return 4 - 4 * mean_cosine(prediction, target, images_per_rank, validate=self.validate)


def mean_cosine(
    prediction: Tensor, target: Tensor, images_per_rank: list[int] | None = None, *, validate: bool = True
) -> Tensor:
    """Mean cosine of predictions of views and targets of the other views of their images, [B, V, D] each, over ranks.

    0-dim; no gradient reaches the target. See SimSiamLoss.
    """
    views, dtype, _ = prepare_views(prediction, images_per_rank, validate=validate)
    with torch.autocast(prediction.device.type, enabled=False):
        p = F.normalize(prediction.to(dtype), dim=-1)
        z = F.normalize(target.detach().to(dtype), dim=-1)
        # all pairs of views, less those of a view with itself
        cosines = (p.sum(1) * z.sum(1)).sum(-1) - (p * z).sum((1, 2))
        cosines = cosines / (views * (views - 1))
        return global_mean(cosines, torch.ones_like(cosines, dtype=torch.bool))
