"""How a classifier is optimized: plan, batches, optimizer, when it is evaluated, which state is the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...data import Splits
from ...errors import ConfigError
from ...training.optim import learning_rate
from ...training.plan import EarlyStopping

_SAME_NAMES = (
    "epochs",
    "iterations",
    "evaluate_every",
    "batch_size",
    "optimizer",
    "weight_decay",
    "decay",
    "schedule",
)
_ONLY_SOME = ("l2_lambda", "clip_norm")


@dataclass(frozen=True)
class FitPlan:
    """Training of one classifier, or of one for each of `lrs`; fields as in the configuration."""

    lrs: tuple[float, ...]
    epochs: int
    batch_size: int
    optimizer: str = "adam"
    weight_decay: float = 0.0
    decay: str = "weights"
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
    """Largest L2 norm of the gradient of one head's parameters."""

    def lr_factor(self, iteration: int, total: int) -> float:
        """Fraction of the peak learning rate at `iteration` (from 0) of `total`."""
        return learning_rate(
            iteration, peak=1.0, steps=total, warmup_steps=0, schedule=self.schedule, final_fraction=0.0
        )


def fit_plan(settings: Any) -> FitPlan:
    """The plan of a section `probe.KIND`."""
    return FitPlan(
        lrs=settings.lrs if hasattr(settings, "lrs") else (settings.lr,),
        monitor=settings.stopping.monitor,
        stopping=settings.stopping.model_dump(exclude={"monitor"}),
        **{name: getattr(settings, name) for name in _SAME_NAMES},
        **{name: getattr(settings, name) for name in _ONLY_SOME if hasattr(settings, name)},
    )


def check_fit(section: str, settings: Any, splits: Splits, steps_per_epoch: int) -> None:
    """Raise ConfigError where the data have no validation split to stop early on, or training ends before the first
    evaluation."""
    for name in ("patience", "target"):
        value = getattr(settings.stopping, name)
        if value is not None and splits.validation is None:
            raise ConfigError(
                f"{section}.stopping.{name}={value:g} but there is no validation split: "
                "make it null, or set data.validation_fraction"
            )
    total = settings.iterations or settings.epochs * steps_per_epoch
    if settings.evaluate_every is not None and settings.evaluate_every > total:
        raise ConfigError(
            f"{section}.evaluate_every={settings.evaluate_every} but training has only {total} iterations: "
            "the validation split would be evaluated only once; lower it, or raise iterations"
        )


class FitProgress:
    """When a classifier is evaluated, the numbers of each evaluation, and which of its states to keep."""

    def __init__(self, plan: FitPlan, steps_per_epoch: int) -> None:
        self.total = plan.iterations or plan.epochs * steps_per_epoch
        """Iterations until training ends, unless it is stopped early."""
        self.history: list[dict[str, Any]] = []
        self._every = plan.evaluate_every or steps_per_epoch
        self._stopping = EarlyStopping(plan.monitor, **(plan.stopping or {}))
        # a second one: the best state is the best by any margin, even where stopping requires min_change
        self._best = EarlyStopping(plan.monitor)

    def due(self, iteration: int) -> bool:
        """Whether to evaluate after `iteration` (from 1)."""
        return iteration % self._every == 0 or iteration == self.total

    def record(self, iteration: int, value: float | None, **numbers: Any) -> bool:
        """Append an evaluation to the history; True where this is the state to keep.

        value: the monitored number on validation; None without a validation split, where the last state is kept.
        """
        self.history.append({"iteration": iteration, **numbers})
        if value is None:
            return True
        self._stopping.update(value, iteration)
        return self._best.update(value, iteration)

    @property
    def stop(self) -> bool:
        return self._stopping.stop


def best_head(losses: Tensor, accuracies: Tensor, monitor: str) -> tuple[int, float]:
    """(index of the best head, its monitored number) from [K] numbers on validation.

    Ties go to the first. A head whose loss is not finite is never the best, unless all are; the number is then NaN.
    """
    worst = torch.full_like(losses, -math.inf)
    k = int((-losses if monitor == "loss" else accuracies).where(losses.isfinite(), worst).argmax())
    if not losses[k].isfinite():
        return k, math.nan
    return k, float(losses[k] if monitor == "loss" else accuracies[k])


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Number of batches that `batches` makes of n rows."""
    return max(1, -(-n // batch_size) - (batch_size > 1 and n % batch_size == 1))


def batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of rows, int64 [<= batch_size + 1], without end: a new permutation of all n rows every epoch.

    A last batch of one row is added to the one before it: BatchNorm is not defined on one row.
    """
    while True:
        parts = list(torch.randperm(n, generator=generator).split(batch_size))
        if len(parts) > 1 and len(parts[-1]) == 1 < batch_size:
            parts[-2:] = [torch.cat(parts[-2:])]
        yield from parts


def split_decayed(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights, biases and norms), of which only the weights decay: they have more than one dimension."""
    everything = list(parameters)
    return [p for p in everything if p.ndim > 1], [p for p in everything if p.ndim <= 1]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    # fused: with a parameter group per head, the Python around unfused updates costs more than the arithmetic
    "adam": partial(torch.optim.Adam, fused=True),
    "adamw": partial(torch.optim.AdamW, fused=True),
    "sgd": partial(torch.optim.SGD, momentum=0.9, fused=True),
}


def build_optimizer(
    groups: Iterable[tuple[Iterable[nn.Parameter], float]], *, name: str, weight_decay: float, decay: str = "weights"
) -> torch.optim.Optimizer:
    """The optimizer `name` of (parameters, peak learning rate) pairs. See `scale_lr`.

    decay: `weights`, or `all` parameters.
    """
    made = []
    for parameters, lr in groups:
        weights, others = split_decayed(parameters)
        made.append({"params": weights, "lr": lr, "peak": lr, "weight_decay": weight_decay})
        made.append({"params": others, "lr": lr, "peak": lr, "weight_decay": weight_decay if decay == "all" else 0.0})
    return OPTIMIZERS[name]([group for group in made if group["params"]])


def scale_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to `factor` times its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
