"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..errors import ConfigError, unknown_name


def build_optimiser(
    params: list[nn.Parameter], *, name: str, lr: float, momentum: float, nesterov: bool, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD or AdamW with two groups: weights decay; norms and biases (one-dimensional) do not.

    Raises ConfigError for an unknown name.
    """
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, foreach=True)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), foreach=True)
    raise ConfigError("optim.name: " + unknown_name("optimiser", name, ["sgd", "adamw"]))


def learning_rate(
    step: int, *, peak: float, steps: int, warmup_steps: int, schedule: str, final_fraction: float
) -> float:
    """The rate of `step` (from 0): linear warm-up, then constant or a cosine from peak to final_fraction * peak.

    A pure function, so that a resumed run needs nothing but its step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr
