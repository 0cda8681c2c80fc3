"""What `hpc-supcon bench loss` compares: losses by name.

`dense` (SupContrast's loss in plain PyTorch; `dense-tf32`: with TF32 products), `compiled` (`dense` under
torch.compile), `pml` (pytorch-metric-learning), and the backends of this package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import MissingExtra
from ..losses import SupConLoss

TEMPERATURE = 0.1
DENSE = ("dense", "dense-tf32", "compiled", "pml", "reference")
"""The contenders that hold N x N matrices."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""(features [N, D], labels [N]) -> loss."""


def dense_supcon(z: Tensor, labels: Tensor) -> Tensor:
    """SupCon "out" as SupContrast computes it: with full matrices, and the row maximum subtracted."""
    z = torch.nn.functional.normalize(z, dim=1)
    mask = torch.eq(labels[:, None], labels[None, :]).float()
    logits = z @ z.T / TEMPERATURE
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = torch.ones_like(mask).fill_diagonal_(0)
    mask = mask * others
    log_prob = logits - torch.log((torch.exp(logits) * others).sum(1, keepdim=True))
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


def contender(name: str) -> Loss:
    """The loss of this name. Raises ConfigError, MissingExtra."""
    if name in ("dense", "dense-tf32"):
        return dense_supcon
    if name == "compiled":
        torch.compiler.reset()  # after eight sizes PyTorch would stop compiling, without a word
        return torch.compile(dense_supcon, dynamic=False)
    if name == "pml":
        try:
            from pytorch_metric_learning.losses import SupConLoss as PmlLoss
        except ModuleNotFoundError:
            raise MissingExtra("pml is pytorch-metric-learning: pip install 'hpc-supcon[bench]'") from None
        return PmlLoss(temperature=TEMPERATURE)
    backend, _, precision = name.partition("-")
    # as in training, where the step checks its numbers itself
    return SupConLoss(TEMPERATURE, backend=backend, precision=precision or "auto", validate=False)
