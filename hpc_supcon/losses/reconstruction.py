"""The autoencoder's loss. Under ranks: a plain mean, exact where every rank holds equally many images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, LossInputError


class ReconstructionLoss(nn.Module):
    """alpha x mean squared error + (1 - alpha) x mean absolute error, over all entries; 0 <= alpha <= 1."""

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha must lie in [0, 1]; got {alpha}")
        self.alpha = alpha

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Both of one shape, any [B, ...] -> 0-dim loss, in fp32 or wider."""
        if reconstruction.shape != target.shape:
            raise LossInputError(
                f"reconstruction and target differ in shape: {list(reconstruction.shape)}, {list(target.shape)}"
            )
        output = reconstruction if reconstruction.element_size() == 8 else reconstruction.float()
        target = target.to(output.dtype)
        return self.alpha * F.mse_loss(output, target) + (1 - self.alpha) * F.l1_loss(output, target)
