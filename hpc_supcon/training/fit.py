"""The training loop: batches in order, learning rate, logging, validation, saving."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Batch, replaced_on_all_ranks
from ..distributed.collectives import gather_objects
from ..distributed.preemption import interrupted
from ..distributed.watchdog import current_watchdog
from ..phases import phase
from .callbacks import Callbacks
from .checkpointer import Checkpointer
from .memory import memory_advice
from .metrics import Meter, MetricLog, ProgressLine
from .state import Training
from .step import StepResult, train_step
from .validation import Validate

COLLAPSED = 0.99
"""Mean cosine similarity of a batch's embeddings above which the loss cannot tell them apart."""


def fit(
    training: Training,
    checkpointer: Checkpointer,
    validate: Validate | None = None,
    *,
    log: MetricLog,
    progress: ProgressLine,
    after_step: Callable[[], None] = lambda: None,
    callbacks: Callbacks | None = None,
) -> bool:
    """Train from `state.step` to `plan.steps`, or until early stopping or a callback ends the run.

    after_step: called after each completed step. Returns True when the run was preempted (see
    distributed/watchdog.py) or interrupted, and has saved before its end. Raises NonFinite, OutOfMemory,
    CallbackError, and what the loader, `checkpointer` and `validate` raise. Collective.
    """
    loop = _Loop(training, checkpointer, validate, log, progress, callbacks or Callbacks())
    state, plan = training.state, training.plan
    state.parallel.train()
    meter, watchdog = Meter(plan.images_per_step), current_watchdog()
    numbers: dict[str, float] = {}
    preempted = collapsed = False
    with watchdog.training(), collect_garbage_every(plan.gc_every_steps) as collect_garbage:
        if state.step and loop.validation_is_due:
            loop.validate_and_save()  # the run was preempted after this step and before its validation
        while not loop.done and not preempted:
            epoch, start = divmod(state.step, plan.steps_per_epoch)
            for batch in meter.timed(training.loader.epoch(epoch, start)):
                lr = plan.lr(state.step)
                state.engine.set_learning_rate(lr)
                with memory_advice(state, batch, training.options):
                    result = train_step(state, batch, training.options)
                meter.add(result.loss)
                preempted = (watchdog.completed(state.step) or interrupted()) and state.step < plan.steps
                if state.step % plan.log_every == 0 or state.step == plan.steps:
                    state.confirm_finite()
                    numbers, more = meter.read(plan.steps - state.step), loop.measure(batch, result)
                    log.log("train", state.step, epoch=epoch, lr=lr, **numbers, **more)
                    progress.update(state.step, numbers)
                    loop.callbacks.step(state.step, {"epoch": epoch, "lr": lr, **numbers, **more})
                    collapsed = collapsed or loop.warn_if_collapsed(more)
                if loop.end_step(preempted=preempted):
                    meter.skip()
                collect_garbage(state.step)
                after_step()
                if preempted or loop.done:
                    break
            state.confirm_finite()
            progress.end_epoch(epoch + 1, numbers or meter.read(plan.steps - state.step))
    if not preempted:
        loop.callbacks.end(state.step)
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)
    return preempted


@dataclass(frozen=True)
class _Loop:
    """The parts of the loop that do not belong to every step."""

    training: Training
    checkpointer: Checkpointer
    validate: Validate | None
    log: MetricLog
    progress: ProgressLine
    callbacks: Callbacks

    @property
    def done(self) -> bool:
        state = self.training.state
        stops = self.callbacks.reason is not None or (state.stopping is not None and state.stopping.stop)
        return stops or state.step >= self.training.plan.steps

    @property
    def validation_is_due(self) -> bool:
        state = self.training.state
        is_step = self.validate is not None and self.training.plan.validate_at(state.step)
        return is_step and state.last_validated_step < state.step

    def end_step(self, *, preempted: bool) -> bool:
        """What comes after each step and its numbers; whether it validated. Collective."""
        step, steps_per_epoch = self.training.state.step, self.training.plan.steps_per_epoch
        if step % steps_per_epoch == 0:
            self.callbacks.epoch(step // steps_per_epoch)
        validated = self.validate_and_save(preempted=preempted)
        if self.callbacks.reason is not None:
            self.log.log("stopped", step, reason=self.callbacks.reason)
            self.progress.print(f"stopped at step {step}: {self.callbacks.reason}")
        return validated

    def validate_and_save(self, *, preempted: bool = False) -> bool:
        """Validate, then save, where either is due after this step; whether it validated. Collective.

        A preempted run saves without validation; it validates when it is resumed.
        """
        state, watchdog, improved = self.training.state, current_watchdog(), False
        validates = self.validation_is_due and not preempted
        if validates:
            snapshot = self.checkpointer.snapshot(state)
            with watchdog.phase("validation", may_exit=True, snapshot=snapshot):
                improved = self.run_validation()
        if improved or preempted or self.training.plan.save_at(state.step) or self.done:
            with watchdog.phase("saving"):
                self.checkpointer.save(state)
        return validates

    @phase("validation")
    def run_validation(self) -> bool:
        """Validate and log the numbers; whether early stopping finds them the best so far. Collective."""
        assert self.validate is not None
        state = self.training.state
        numbers = gather_objects(self.validate())[0]  # rank 0's, to the bit: all ranks must decide alike
        self.log.log("validation", state.step, **numbers)
        self.progress.print_validation(state.step, numbers)
        state.last_validated_step = state.step
        self.callbacks.evaluation(state.step, numbers)
        stopping = state.stopping
        if stopping is None:
            return False
        improved = stopping.update(numbers[stopping.monitor], state.step)
        if stopping.stop:
            evaluations = stopping.without_improvement
            why = "target reached" if stopping.reached else f"no improvement in {evaluations} evaluations"
            self.log.log("stopped", state.step, reason=why, best=stopping.best, best_step=stopping.best_at)
            self.progress.print(
                f"stopped at step {state.step}: {why}; best {stopping.monitor} {stopping.best} at {stopping.best_at}"
            )
        return improved

    def measure(self, batch: Batch, result: StepResult) -> dict[str, float]:
        """Numbers that cost too much for every step. Collective."""
        state = self.training.state
        replaced = replaced_on_all_ranks(self.training.loader, state.device)
        numbers: dict[str, Tensor | float] = {"replaced_images": replaced} if replaced else {}
        numbers |= {**state.engine.statistics(), **state.objective.statistics()}
        numbers |= state.objective.embedding_numbers(result.outputs, batch.labels)
        if torch.isfinite(result.gradient_norm):  # it is not in a step that was skipped because fp16 overflowed
            numbers["grad_norm"] = result.gradient_norm
        if self.training.plan.gradient_response:
            numbers |= state.objective.gradient_response(result.outputs, batch.labels)
        return {name: float(value) for name, value in numbers.items()}

    def warn_if_collapsed(self, numbers: dict[str, float]) -> bool:
        """Warn when the encoder maps all images to nearly the same embedding; whether it does.

        This can happen after steps that are too large, and raises no error.
        """
        state, plan = self.training.state, self.training.plan
        # embeddings are as similar at the start, when the encoder has not learned anything yet
        first = max(20, min(plan.steps, max(plan.steps_per_epoch, 500)))
        if state.step < first or numbers.get("mean_similarity", 0.0) < COLLAPSED:
            return False
        self.log.log("collapsed", state.step, mean_similarity=numbers["mean_similarity"])
        self.progress.print(
            f"step {state.step}: the embeddings have collapsed: the mean cosine similarity of two is "
            f"{numbers['mean_similarity']:.4f}; try a lower optim.lr or a longer optim.warmup_epochs"
        )
        return True


@contextmanager
def collect_garbage_every(steps: int | None) -> Iterator[Callable[[int], None]]:
    """Inside, Python's garbage collector runs only in the function given, which takes the step and collects at every
    `steps`-th one; with None nothing changes.

    Otherwise each rank would pause at another step, and all ranks would wait for it in the next collective. Objects
    that exist at the start are not examined again (gc.freeze), so that a collection takes milliseconds.
    """
    if steps is None or not gc.isenabled():
        yield lambda step: None
        return

    def collect(step: int) -> None:
        if step % steps == 0:
            with phase("garbage"):
                gc.collect()

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.enable()
        gc.unfreeze()
