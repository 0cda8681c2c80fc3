"""How long a classifier is trained, when it is looked at, and which of its states was the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...training.optim import learning_rate
from ...training.plan import EarlyStopping


@dataclass(frozen=True)
class Plan:
    """Training of one classifier, or of one for each of `lrs`; fields as in the configuration."""

    lrs: tuple[float, ...]
    epochs: int
    batch_size: int
    optimizer: str = "adam"
    weight_decay: float = 0.0
    schedule: str = "cosine"
    iterations: int | None = None
    """Optimizer steps in place of epochs."""
    evaluate_every: int | None = None
    """Iterations; None: once per epoch."""
    monitor: str = "accuracy"
    stopping: Mapping[str, Any] | None = None
    """patience (evaluations), min_change, target of EarlyStopping; None never stops early."""
    l2_lambda: float = 0.0
    """l2_lambda * ||W||^2, without a factor 1/2, is added to the mean cross-entropy; W: all but biases."""
    clip_norm: float | None = None
    """Longest gradient (L2 norm over one head's parameters)."""

    def lr_at(self, iteration: int, total: int) -> float:
        """Share of the peak learning rate at `iteration` (from 0)."""
        return learning_rate(
            iteration, peak=1.0, steps=total, warmup_steps=0, schedule=self.schedule, final_fraction=0.0
        )


class Watch:
    """Counts iterations, and keeps what every look at the classifier gave."""

    def __init__(self, plan: Plan, steps_per_epoch: int) -> None:
        self.total = plan.iterations or plan.epochs * steps_per_epoch
        self._every = plan.evaluate_every or steps_per_epoch
        self._stopping = EarlyStopping(plan.monitor, **(plan.stopping or {}))
        # of its own: the best state is the best by any margin, also where stopping asks for min_change
        self._best = EarlyStopping(plan.monitor)
        self.history: list[dict[str, Any]] = []

    def due(self, iteration: int) -> bool:
        return iteration % self._every == 0 or iteration == self.total

    def note(self, iteration: int, value: float | None, **numbers: Any) -> bool:
        """Keep `numbers`; True where this state is the one to keep. `value`: the monitored number on validation;
        None without a validation split, where the last state is kept."""
        self.history.append({"iteration": iteration, **numbers})
        if value is None:
            return True
        self._stopping.update(value, iteration)
        return self._best.update(value, iteration)

    @property
    def stop(self) -> bool:
        return self._stopping.stop

    @property
    def monitor(self) -> str:
        return self._best.monitor


def best_head(losses: Tensor, accuracies: Tensor, monitor: str) -> tuple[int, float]:
    """(which head is best, its number) of [K] numbers on validation; ties go to the first, NaN never wins."""
    worst = torch.full_like(losses, -math.inf)
    k = int((-losses if monitor == "loss" else accuracies).where(losses.isfinite(), worst).argmax())
    if not losses[k].isfinite():
        return k, math.nan
    return k, float(losses[k] if monitor == "loss" else accuracies[k])


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches that `batches` makes of n rows."""
    return max(1, -(-n // batch_size) - (batch_size > 1 and n % batch_size == 1))


def batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows int64 [<= batch_size + 1] without end: every epoch a new permutation, each row once.

    A last batch of one row joins the one before it: BatchNorm is not defined on one row.
    """
    while True:
        parts = list(torch.randperm(n, generator=generator).split(batch_size))
        if len(parts) > 1 and len(parts[-1]) == 1 < batch_size:
            parts[-2:] = [torch.cat(parts[-2:])]
        yield from parts


def decayed(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights, biases and norms): only the weights have more than one dimension."""
    everything = list(parameters)
    return [p for p in everything if p.ndim > 1], [p for p in everything if p.ndim <= 1]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    # fused: with groups per head, the Python around unfused updates costs more than the arithmetic
    "adam": partial(torch.optim.Adam, fused=True),
    "adamw": partial(torch.optim.AdamW, fused=True),
    "sgd": partial(torch.optim.SGD, momentum=0.9, fused=True),
}


def build_stepper(
    groups: Iterable[tuple[Iterable[nn.Parameter], float]], *, optimizer: str, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of (parameters, peak learning rate) pairs; weights alone decay. See `set_share`."""
    made = []
    for parameters, lr in groups:
        weights, others = decayed(parameters)
        made.append({"params": weights, "lr": lr, "peak": lr, "weight_decay": weight_decay})
        made.append({"params": others, "lr": lr, "peak": lr, "weight_decay": 0.0})
    return OPTIMIZERS[optimizer]([group for group in made if group["params"]])


def set_share(stepper: torch.optim.Optimizer, share: float) -> None:
    """Give every group `share` of its own peak learning rate."""
    for group in stepper.param_groups:
        group["lr"] = group["peak"] * share
