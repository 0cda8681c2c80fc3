"""Linear evaluation: several linear heads on frozen features, chosen on validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..collectives import all_sum
from ..models import LinearHeads


@dataclass(frozen=True)
class LinearProbe:
    """The chosen head: logits are (features - mean) / std @ weight + bias."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    lr: float
    epoch: int

    def predict(self, features: Tensor) -> Tensor:
        """[n, D] -> int64 [n]."""
        return ((features - self.mean) / self.std @ self.weight + self.bias).argmax(dim=1)


def train_linear_probe(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor] | None,
    *,
    classes: int,
    lrs: tuple[float, ...],
    epochs: int,
    batch_size: int,
    optimiser: str,
    weight_decay: float,
    standardise: bool,
    seed: int,
) -> LinearProbe:
    """Train one head per learning rate side by side (cosine to 0); keep the best epoch of the best head.

    train: (features [N, D], labels [N]), ALL samples on every rank: each trains the same heads, which costs
    less than a gradient message per step and gives the same result on any number of ranks.
    validation: this rank's share; its accuracy chooses, ties going to the earlier epoch and smaller rate.
    Without validation there must be one learning rate, and the last epoch is kept.
    """
    features, labels = train
    mean, std = features.new_zeros(features.shape[1]), features.new_ones(features.shape[1])
    if standardise:
        spread, mean = torch.std_mean(features, dim=0, correction=0)
        std = spread.clamp(min=1e-6)
    x = (features - mean) / std
    heads = LinearHeads(len(lrs), x.shape[1], classes).to(x)
    groups = [{"params": heads.head_parameters(k), "lr": lr} for k, lr in enumerate(lrs)]
    stepper = _OPTIMISERS[optimiser](groups, weight_decay=weight_decay)
    steps = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, steps)
    generator = torch.Generator().manual_seed(seed)
    best: LinearProbe | None = None
    best_accuracy = -1.0
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
            _step(heads, stepper, x[rows], labels[rows])
            schedule.step()
        if validation is not None:
            accuracy = _accuracies(heads, (validation[0] - mean) / std, validation[1])
            k = int(accuracy.argmax())
            if accuracy[k] > best_accuracy:
                best_accuracy = float(accuracy[k])
                best = _probe(heads, k, mean, std, lrs[k], epoch + 1)
    return best or _probe(heads, 0, mean, std, lrs[0], epochs)


_OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    # fused: with a group per head, the Python around unfused updates costs more than the arithmetic
    "adamw": partial(torch.optim.AdamW, fused=True),
    "sgd": partial(torch.optim.SGD, lr=1.0, momentum=0.9, fused=True),
}


def _step(heads: LinearHeads, stepper: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> None:
    logits = heads(x)
    # the sum over heads of each head's mean: no head's gradient depends on another
    loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="sum") / len(labels)
    stepper.zero_grad(set_to_none=True)
    loss.backward()
    stepper.step()


@torch.no_grad()
def _accuracies(heads: LinearHeads, x: Tensor, labels: Tensor) -> Tensor:
    """Fraction right of every head [K], over all ranks' samples."""
    right = (heads(x).argmax(dim=2) == labels).sum(dim=1)
    counts = all_sum(torch.cat([right, right.new_tensor([len(labels)])]))
    return counts[:-1] / counts[-1]


def _probe(heads: LinearHeads, k: int, mean: Tensor, std: Tensor, lr: float, epoch: int) -> LinearProbe:
    weight, bias = (p.detach().clone() for p in heads.head_parameters(k))
    return LinearProbe(mean, std, weight, bias, lr, epoch)
