"""The training loop: batches in order, learning rate, logging, saving."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Batch, Loader, replaced_everywhere
from ..distributed.collectives import gather_objects
from ..distributed.watchdog import current_watchdog
from ..phases import phase
from .memory import memory_advice
from .metrics import MetricLog, ProgressLine
from .state import TrainState
from .step import StepResult, train_step

COLLAPSED = 0.99
"""Mean cosine similarity of a batch's embeddings from which on the loss cannot tell them apart."""


@dataclass(frozen=True)
class Plan:
    """How long to train and when to speak, look and save, in optimizer steps; `lr(step)` is the schedule."""

    steps: int
    steps_per_epoch: int
    images_per_step: int
    lr: Callable[[int], float]
    log_every: int
    save_at: Callable[[int], bool]
    validate_at: Callable[[int], bool] = lambda step: False
    gradient_response: bool = False

    @property
    def epochs(self) -> int:
        """Epochs begun."""
        return -(-self.steps // self.steps_per_epoch)


class Meter:
    """Mean loss, throughput and the share of time spent waiting for data since it was last read.

    The loss stays on the device until `read`, so that a step never waits for it.
    """

    def __init__(self, images_per_step: int) -> None:
        self._images_per_step = images_per_step
        self._reset()

    def _reset(self) -> None:
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()
        self._stepped = self._since
        self._loss: Tensor | float = 0.0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            with phase("data"):
                batch = next(iterator, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor) -> None:
        self._loss = self._loss + loss
        self._steps += 1
        self._stepped = time.perf_counter()

    def skip(self) -> None:
        """Leave out the time since the last step: it was spent on something else."""
        self._since += time.perf_counter() - self._stepped

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


@dataclass(frozen=True)
class Calls:
    """What the loop calls; all are collective and may raise."""

    save: Callable[[TrainState], None]
    validate: Callable[[TrainState], dict[str, float]] | None = None
    hold: Callable[[TrainState], Callable[[], None]] | None = None
    """Returns what saves the state of now, from any thread."""
    stepped: Callable[[int], None] = lambda step: None
    """Told of every step once all that belongs to it is done."""


def fit(
    state: TrainState, loader: Loader, plan: Plan, calls: Calls, *, log: MetricLog, progress: ProgressLine
) -> bool:
    """Train from `state.step` to `plan.steps`, or until `state.stopping` has seen enough.

    True when it was asked to leave (see watchdog.py) and did so earlier, having saved. Raises NonFinite, OutOfMemory,
    and what loader and calls raise.
    """
    state.parallel.train()
    meter, watchdog = Meter(plan.images_per_step), current_watchdog()
    numbers: dict[str, float] = {}
    leaving = collapsed = False
    with watchdog.training():
        if state.step and _look_is_due(state, plan, calls):
            _settle(state, plan, calls, log, progress, leaving=False)  # the run left between this step and its look
        while not _done(state, plan) and not leaving:
            epoch, start = divmod(state.step, plan.steps_per_epoch)
            for batch in meter.timed(loader.epoch(epoch, start)):
                lr = plan.lr(state.step)
                state.engine.set_learning_rate(lr)
                with memory_advice(state, batch):
                    result = train_step(state, batch)
                meter.add(result.loss)
                leaving = watchdog.completed(state.step) and state.step < plan.steps
                if state.step % plan.log_every == 0 or state.step == plan.steps:
                    state.guard.settle()
                    numbers = meter.read(plan.steps - state.step)
                    more = _details(state, loader, batch, result, plan)
                    log.log("train", state.step, epoch=epoch, lr=lr, **numbers, **more)
                    progress.update(state.step, numbers)
                    collapsed = collapsed or _tell_of_collapse(state, plan, more, log, progress)
                if _settle(state, plan, calls, log, progress, leaving=leaving):
                    meter.skip()
                calls.stepped(state.step)
                if leaving or _done(state, plan):
                    break
            progress.epoch_done(epoch + 1, numbers or meter.read(plan.steps - state.step))
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)
    return leaving


def _tell_of_collapse(
    state: TrainState, plan: Plan, numbers: dict[str, float], log: MetricLog, progress: ProgressLine
) -> bool:
    """Whether all embeddings have become one, as they may after steps that are too large: nothing crashes then."""
    # an encoder that has learned nothing yet also answers everything alike, and may still part its answers
    first = max(20, min(plan.steps, max(plan.steps_per_epoch, 500)))
    if state.step < first or numbers.get("mean_similarity", 0.0) < COLLAPSED:
        return False
    log.log("collapsed", state.step, mean_similarity=numbers["mean_similarity"])
    progress.say(
        f"step {state.step}: the embeddings have collapsed: the mean cosine similarity of two is "
        f"{numbers['mean_similarity']:.4f}; try a lower optim.lr or a longer optim.warmup_epochs"
    )
    return True


def _settle(
    state: TrainState, plan: Plan, calls: Calls, log: MetricLog, progress: ProgressLine, *, leaving: bool
) -> bool:
    """Look at validation, then save, where this step is one for it; whether it looked. On the way out it does not."""
    watchdog, improved = current_watchdog(), False
    looks = _look_is_due(state, plan, calls) and not leaving
    if looks and calls.validate is not None:
        with watchdog.phase("validation", may_exit=True, snapshot=calls.hold and calls.hold(state)):
            improved = _look(state, calls.validate, log, progress)
    if improved or leaving or plan.save_at(state.step) or _done(state, plan):
        with watchdog.phase("saving"):
            calls.save(state)
    return looks


def _look_is_due(state: TrainState, plan: Plan, calls: Calls) -> bool:
    return calls.validate is not None and plan.validate_at(state.step) and state.last_validated_step < state.step


def _done(state: TrainState, plan: Plan) -> bool:
    return state.step >= plan.steps or (state.stopping is not None and state.stopping.stop)


@phase("validation")
def _look(
    state: TrainState, validate: Callable[[TrainState], dict[str, float]], log: MetricLog, progress: ProgressLine
) -> bool:
    """Measure on validation; whether early stopping calls it the best so far. Collective."""
    numbers = gather_objects(validate(state))[0]  # rank 0's, to the bit: all must decide alike
    log.log("validation", state.step, **numbers)
    progress.validated(state.step, numbers)
    state.last_validated_step = state.step
    stopping = state.stopping
    if stopping is None:
        return False
    improved = stopping.update(numbers[stopping.monitor], state.step)
    if stopping.stop:
        why = (
            "target reached" if stopping.reached else f"no improvement in {stopping.without_improvement} evaluations"
        )
        log.log("stopped", state.step, reason=why, best=stopping.best, best_step=stopping.best_at)
        progress.say(
            f"stopped at step {state.step}: {why}; best {stopping.monitor} {stopping.best} at {stopping.best_at}"
        )
    return improved


def _details(state: TrainState, loader: Loader, batch: Batch, result: StepResult, plan: Plan) -> dict[str, float]:
    """What only a logged step pays for. Collective."""
    replaced = replaced_everywhere(loader, state.device)
    numbers: dict[str, Tensor | float] = {"replaced_images": replaced} if replaced else {}
    numbers |= {**state.engine.statistics(), **state.objective.statistics()}
    numbers |= state.objective.similarity(result.outputs)
    if torch.isfinite(result.gradient_norm):  # not so in a step that fp16's loss scaling skipped
        numbers["grad_norm"] = result.gradient_norm
    if plan.gradient_response:
        numbers |= state.objective.response(result.outputs, batch.labels)
    return {name: float(value) for name, value in numbers.items()}
