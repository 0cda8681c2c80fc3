"""Losses of single images, on logits or pixels: means over the images of this rank.

The mean over ranks of these means is the mean over all images where all ranks have equally many.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, LossInputError


class CrossEntropyLoss(nn.Module):
    """Mean cross-entropy of softmax(logits) [N, C] against labels [N] (class indices), in fp32 or wider."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels = _check(logits, labels)
        return F.cross_entropy(logits, labels)


class CrossEntropyMAELoss(nn.Module):
    """Cross-entropy plus the mean absolute error of softmax(logits) [N, C] against one_hot(labels), in fp32 or wider.

    The absolute error is averaged over all N x C entries.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels = _check(logits, labels)
        with torch.autocast(logits.device.type, enabled=False):
            one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
            return F.cross_entropy(logits, labels) + F.l1_loss(logits.softmax(1), one_hot)


def _check(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in fp32 or fp64 and labels in int64. Raises LossInputError."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise LossInputError(
            f"logits must be [N, C] and labels [N]; got {list(logits.shape)} and {list(labels.shape)}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise LossInputError(f"labels must be of an integer dtype; got {labels.dtype}")
    return (logits if logits.dtype == torch.float64 else logits.float()), labels.long()


class ReconstructionLoss(nn.Module):
    """alpha x mean squared error + (1 - alpha) x mean absolute error, over all entries; 0 <= alpha <= 1."""

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha must lie in [0, 1]; got {alpha}")
        self.alpha = alpha

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Two tensors of the same shape [B, ...] -> 0-dim loss, in fp32 or wider."""
        if reconstruction.shape != target.shape:
            raise LossInputError(
                f"reconstruction and target differ in shape: {list(reconstruction.shape)}, {list(target.shape)}"
            )
        output = reconstruction if reconstruction.element_size() == 8 else reconstruction.float()
        target = target.to(output.dtype)
        return self.alpha * F.mse_loss(output, target) + (1 - self.alpha) * F.l1_loss(output, target)
