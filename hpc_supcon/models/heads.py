"""Heads on an encoder's features: the projection for the loss, linear classifiers for evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Module):
    """One hidden layer (ReLU), then rows of unit length in fp32: [N, in_dim] -> [N, out_dim].

    SimCLR (Chen et al. 2020, section 2.1) and SupCon (Khosla et al. 2020, section 3.1).
    """

    def __init__(self, in_dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_dim, hidden)
        self.out = nn.Linear(hidden, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        z = self.out(F.relu(self.hidden(features)))
        return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)


class LinearHeads(nn.Module):
    """K independent linear classifiers trained side by side: features [N, D] -> logits [K, N, classes].

    One batched product instead of K small ones; head k never sees the others. Parameters are apart, so that
    each head can have its own optimiser settings: `head_parameters(k)`.
    """

    def __init__(self, heads: int, in_dim: int, classes: int) -> None:
        super().__init__()
        # zeros: the loss is convex, and a fixed start makes the heads differ by learning rate alone
        self.weights = nn.ParameterList(torch.zeros(in_dim, classes) for _ in range(heads))
        self.biases = nn.ParameterList(torch.zeros(1, classes) for _ in range(heads))

    def head_parameters(self, k: int) -> list[nn.Parameter]:
        return [self.weights[k], self.biases[k]]

    def forward(self, features: Tensor) -> Tensor:
        weight, bias = torch.stack(list(self.weights)), torch.stack(list(self.biases))
        return torch.baddbmm(bias, features.expand(len(weight), -1, -1), weight)
