"""Losses of correlations between the dimensions of embeddings: Barlow Twins and VICReg.

Means, variances and products of dimensions are those of the images of all ranks, as sums that the ranks exchange: a
batch on several ranks has the value and the gradient of one process.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from ..distributed.collectives import all_sum, sum_with_grad
from ..errors import LossInputError
from .validation import prepare_views

EPS = 1e-5
"""Added to variances by the BatchNorm without weights of Barlow Twins' authors."""
VARIANCE_EPS = 1e-4
"""Added to variances before the square root by VICReg's authors."""


class BarlowTwinsLoss(nn.Module):
    """sum over i of (1 - C_ii)^2 + redundancy_weight x sum over i != j of C_ij^2.

    C [D, D] is the correlation between the dimensions of one view and those of another, over the images of all ranks
    (Zbontar et al. 2021, arXiv 2103.03230, equations 1 and 2). With more than two views it is the mean over pairs of
    views. The value is between 0 and about D (1 + redundancy_weight D). After a call, `stats` holds the two sums:
    `invariance` (D where the embeddings do not depend on the image) and `redundancy`.
    """

    def __init__(self, redundancy_weight: float = 0.005, *, validate: bool = True) -> None:
        super().__init__()
        self.redundancy_weight, self.validate = redundancy_weight, validate
        self.stats: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, images_per_rank: list[int] | None = None) -> Tensor:
        """[B, V, D] of any length, V >= 2 -> 0-dim loss, the same on every rank. Every rank must call this.

        `images_per_rank`: B of every rank, where all ranks know it. Raises LossInputError, also for a single image.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            centered, images = _centered(embeddings, images_per_rank, self.validate)
            scale = (sum_with_grad(centered.square().sum(0)) / images + EPS).rsqrt()
            pairs = list(combinations(range(embeddings.shape[1]), 2))
            products = torch.stack([centered[:, a].T @ centered[:, b] for a, b in pairs])
            products = sum_with_grad(products) / images
            correlations = torch.stack(
                [scale[a, :, None] * product * scale[b] for product, (a, b) in zip(products, pairs, strict=True)]
            )
            invariance = (1 - correlations.diagonal(dim1=1, dim2=2)).square().sum() / len(pairs)
            redundancy = _off_diagonal(correlations).square().sum() / len(pairs)
        self.stats = {"invariance": invariance.detach(), "redundancy": redundancy.detach()}
        return invariance + self.redundancy_weight * redundancy


class VICRegLoss(nn.Module):
    """invariance x mean (z - z')^2 + variance x [v(Z) + v(Z')] + covariance x [c(Z) + c(Z')], over all ranks.

    v(Z) is the mean over dimensions of max(0, 1 - sqrt(Var + 1e-4)), c(Z) the sum of the squared covariances of
    different dimensions, divided by D; variances and covariances are of a view's embeddings, divided by the number
    of images less one (Bardes et al. 2022, arXiv 2105.04906, equations 1 to 6). With more than two views, the first
    term is the mean over pairs of views, and the others twice their mean over views. After a call, `stats` holds the
    three terms without their weights; `variance_term` is near 2 where the embeddings have collapsed.
    """

    def __init__(
        self,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        *,
        validate: bool = True,
    ) -> None:
        super().__init__()
        self.weights = invariance_weight, variance_weight, covariance_weight
        self.validate = validate
        self.stats: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, images_per_rank: list[int] | None = None) -> Tensor:
        """As BarlowTwinsLoss."""
        with torch.autocast(embeddings.device.type, enabled=False):
            centered, images = _centered(embeddings, images_per_rank, self.validate)
            views, dim = embeddings.shape[1:]
            pairs = list(combinations(range(views), 2))
            rows = embeddings.to(centered.dtype)
            distance = torch.stack([(rows[:, a] - rows[:, b]).square().sum() for a, b in pairs]).sum()
            invariance = sum_with_grad(distance) / (images * dim * len(pairs))
            by_view = centered.transpose(0, 1)  # [V, B, D]
            covariances = sum_with_grad(by_view.transpose(1, 2) @ by_view) / (images - 1)
            deviations = (covariances.diagonal(dim1=1, dim2=2) + VARIANCE_EPS).sqrt()
            variance = 2 * torch.relu(1 - deviations).mean()
            covariance = 2 * _off_diagonal(covariances).square().sum() / (dim * views)
        terms = torch.stack([invariance, variance, covariance])
        names = ("invariance_term", "variance_term", "covariance_term")
        self.stats = dict(zip(names, terms.detach().unbind(), strict=True))
        return (terms * terms.new_tensor(self.weights)).sum()


def _centered(embeddings: Tensor, images_per_rank: list[int] | None, validate: bool) -> tuple[Tensor, int]:
    """(embeddings [B, V, D] in fp32 or fp64 less their mean over the images of all ranks, number of those images).

    The mean is a constant for the gradient. That is exact for sums of products of centered values over all ranks:
    such a sum is at its minimum, or flat, in the mean.
    """
    _, dtype, images = prepare_views(embeddings, images_per_rank, validate=validate)
    if images < 2:
        raise LossInputError(
            f"a loss of correlations between dimensions needs a batch of at least 2 images; got {images}"
        )
    rows = embeddings.to(dtype)
    return rows - all_sum(rows.sum(0)) / images, images


def _off_diagonal(matrices: Tensor) -> Tensor:
    """[P, D, D] with zeros in place of the diagonals."""
    return matrices.masked_fill(torch.eye(matrices.shape[-1], dtype=torch.bool, device=matrices.device), 0.0)
