"""The training loop: batches in order, learning rate, logging, saving."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Batch, Loader, replaced_everywhere
from .metrics import MetricLog, ProgressLine
from .optim import set_learning_rate
from .state import TrainState
from .step import StepResult, train_step


@dataclass(frozen=True)
class Plan:
    """How long to train and when to speak and save, in optimiser steps; `lr(step)` is the schedule."""

    epochs: int
    steps_per_epoch: int
    images_per_step: int
    lr: Callable[[int], float]
    log_every: int
    save_at: Callable[[int], bool]
    gradient_response: bool = False

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


class Meter:
    """Mean loss, throughput and the share of time spent waiting for data since it was last read.

    The loss stays on the device until `read`, so that a step never waits for it.
    """

    def __init__(self, images_per_step: int) -> None:
        self._images_per_step = images_per_step
        self._reset()

    def _reset(self) -> None:
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()
        self._loss: Tensor | float = 0.0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor) -> None:
        self._loss = self._loss + loss
        self._steps += 1

    def read(self, steps_left: int) -> dict[str, float]:
        loss = float(self._loss) / max(1, self._steps)  # waits for the device: the time below is real
        elapsed = time.perf_counter() - self._since
        numbers = {
            "loss": loss,
            "images_per_s": round(self._steps * self._images_per_step / elapsed, 1),
            "data_wait": round(self._waited / elapsed, 4),
            "time_left_s": round(steps_left * elapsed / max(1, self._steps), 1),
        }
        self._reset()
        return numbers


def fit(
    state: TrainState,
    loader: Loader,
    plan: Plan,
    *,
    log: MetricLog,
    progress: ProgressLine,
    save: Callable[[TrainState], None],
) -> None:
    """Train from `state.step` to `plan.steps`. Raises NonFinite, and what loader and `save` raise."""
    state.parallel.train()
    meter = Meter(plan.images_per_step)
    numbers: dict[str, float] = {}
    while state.step < plan.steps:
        epoch, start = divmod(state.step, plan.steps_per_epoch)
        for batch in meter.timed(loader.epoch(epoch, start)):
            lr = plan.lr(state.step)
            set_learning_rate(state.optimiser, lr)
            result = train_step(state, batch)
            meter.add(result.loss)
            if state.step % plan.log_every == 0 or state.step == plan.steps:
                numbers = meter.read(plan.steps - state.step)
                more = _details(state, loader, batch, result, plan)
                log.log("train", state.step, epoch=epoch, lr=lr, **numbers, **more)
                progress.update(state.step, numbers)
            if plan.save_at(state.step):
                save(state)
        progress.epoch_done(epoch + 1, numbers or meter.read(plan.steps - state.step))
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)


def _details(state: TrainState, loader: Loader, batch: Batch, result: StepResult, plan: Plan) -> dict[str, float]:
    """What only a logged step pays for. Collective."""
    replaced = replaced_everywhere(loader, state.device)
    numbers: dict[str, Tensor | int] = {"replaced_images": replaced} if replaced else {}
    numbers |= {"grad_norm": result.gradient_norm, **state.objective.statistics()}
    if plan.gradient_response:
        numbers |= state.objective.response(result.outputs, batch.labels)
    return {name: float(value) for name, value in numbers.items()}
