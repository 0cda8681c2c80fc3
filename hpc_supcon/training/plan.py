"""How long to train: the plan of a run in optimizer steps, and early stopping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ..config import Config
from .optim import learning_rate


@dataclass(frozen=True)
class TrainingPlan:
    """How long to train, and when to log, validate and save. All numbers are optimizer steps."""

    steps: int
    """Length of the training."""
    steps_per_epoch: int
    images_per_step: int
    """Images of one global batch."""
    lr: Callable[[int], float]
    """Learning rate of a step, counted from 0."""
    log_every: int
    save_at: Callable[[int], bool]
    """Whether to save after a step, counted from 1."""
    validate_at: Callable[[int], bool] = lambda step: False
    """Whether to validate after a step, counted from 1."""
    gradient_response: bool = False
    """Whether logged steps measure the gradient response (see Objective.response)."""
    gc_every_steps: int | None = None
    """Steps between two runs of Python's garbage collector; None: Python decides."""

    @property
    def epochs(self) -> int:
        """Epochs, counting a last incomplete one."""
        return -(-self.steps // self.steps_per_epoch)


def build_plan(config: Config, steps_per_epoch: int) -> TrainingPlan:
    optim, saving, validation = config.optim, config.checkpoint, config.validation
    steps = config.train.iterations or config.train.epochs * steps_per_epoch

    def is_due(step: int, every_steps: int | None, every_epochs: int | None) -> bool:
        return any(n and step % n == 0 for n in (every_steps or 0, (every_epochs or 0) * steps_per_epoch))

    return TrainingPlan(
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        images_per_step=config.data.batch_size,
        lr=partial(
            learning_rate,
            peak=peak_lr(config),
            steps=steps,
            warmup_steps=optim.warmup_iterations or round(optim.warmup_epochs * steps_per_epoch),
            schedule=optim.schedule,
            final_fraction=optim.final_lr_fraction,
            milestones=optim.milestones,
            gamma=optim.gamma,
        ),
        log_every=config.log.every_steps,
        save_at=lambda step: step == steps or is_due(step, saving.every_steps, saving.every_epochs),
        validate_at=lambda step: is_due(step, validation.every_steps, validation.every_epochs),
        gradient_response=config.log.gradient_response,
        gc_every_steps=config.train.gc_every_steps,
    )


def peak_lr(config: Config) -> float:
    """The highest learning rate of the schedule."""
    if config.optim.lr_per_256 is None:
        return config.optim.lr
    return config.optim.lr_per_256 * config.data.batch_size / 256


class EarlyStopping:
    """Follows one number over the evaluations: call `update`, then read `stop`.

    The number must be equal on all ranks (see collectives.all_sum); then so is the decision. `monitor` is "loss",
    which should fall, or "accuracy" (a fraction), which should rise. Without patience and target it never stops, but
    still knows the best value.
    """

    def __init__(
        self,
        monitor: str,
        *,
        patience: int | None = None,
        patience_unit: Literal["evaluations", "iterations"] = "evaluations",
        min_change: float = 0.0,
        target: float | None = None,
    ) -> None:
        """patience: evaluations in a row, or iterations from the best evaluation on, without an improvement; 0 ends
        at the first evaluation that is none. None: no limit."""
        assert monitor in ("loss", "accuracy")
        self.monitor, self.patience, self.min_change, self.target = monitor, patience, min_change, target
        self.patience_unit = patience_unit
        self._sign = -1.0 if monitor == "loss" else 1.0
        self.best: float | None = None
        """The best value so far."""
        self.best_at: int | None = None
        """The evaluation of the best value: its `at`."""
        self.without_improvement = 0
        """Number of evaluations since the best one."""
        self.waited = 0
        """From the best evaluation, or the first where none is good, to the last one: in units of `at`."""
        self._since: int | None = None
        self.reached = False
        """Whether the target was reached."""

    def update(self, value: float, at: int) -> bool:
        """Take in the value of the evaluation `at` (an iteration); True when it is the best so far.

        NaN is no improvement.
        """
        gain = self._sign * (value - self.best) if self.best is not None else float("inf")
        improved = gain > self.min_change and value == value
        if improved:
            self.best, self.best_at, self.without_improvement, self._since = value, at, 0, at
        else:
            self.without_improvement += 1
            self._since = at if self._since is None else self._since
        self.waited = at - self._since
        if self.target is not None and self._sign * (value - self.target) >= 0:
            self.reached = True
        return improved

    @property
    def stop(self) -> bool:
        """Whether training should end: the target is reached, or the patience is used up."""
        if self.patience is None or not self.without_improvement:
            return self.reached
        waited = self.waited if self.patience_unit == "iterations" else self.without_improvement
        return self.reached or waited >= self.patience

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint's state.json."""
        return {
            "best": self.best,
            "best_at": self.best_at,
            "without_improvement": self.without_improvement,
            "waited": self.waited,
            "since": self._since,
            "reached": self.reached,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.best, self.best_at = state["best"], state["best_at"]
        self.without_improvement, self.reached = state["without_improvement"], state["reached"]
        # checkpoints of 0.1 have no `waited`
        self.waited, self._since = state.get("waited", 0), state.get("since", self.best_at)


def build_stopping(config: Config) -> EarlyStopping | None:
    stop = config.train.stopping
    return None if stop.patience is None and stop.target is None else EarlyStopping(**stop.model_dump())
