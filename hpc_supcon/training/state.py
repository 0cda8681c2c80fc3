"""A training run in memory: its state, the settings of its step, and all that the training loop needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import seeding
from ..data import Loader, MultiCrop, Views
from ..distributed.collectives import gather_objects
from ..errors import NonFinite
from ..models import LoadedWeights, PretrainingModel
from ..pruning import GradualPruning, WeightMasks
from .ema import MomentumQueue, WeightAverage
from .engine import Engine
from .objective import Objective
from .plan import EarlyStopping, TrainingPlan


@dataclass(frozen=True)
class StepOptions:
    """Settings of the training step: the same in every step, and not saved."""

    seed: int = 0
    """Seed of the run: the random streams of every step follow from it, the rank and the step."""
    rank: int = 0
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    """Context of the forward passes: their number format."""
    clip_norm: float | None = None
    """Largest global norm of the gradients that the optimizer gets; None: no clipping."""
    micro_batch_size: int | None = None
    """Images per piece of the two-pass step; None: one pass."""
    images_per_rank: list[int] | None = None
    """Number of images in every rank's batch; None: the ranks exchange these numbers in every step."""
    defer_finite_check: bool = False
    """Read the check for NaN and Inf one step later, so that the host does not wait for the device."""


class FiniteCheck:
    """The check of one step for NaN and Inf. Creating it only starts the computation; `confirm` waits for the answer.

    Loss and averaged gradients are equal on all ranks, so all ranks come to the same answer without a message. Where
    the host should not wait for the device in every step (StepOptions.defer_finite_check), the numbers are read one
    step later: before the next update, and before anything is logged, validated or saved (TrainState.confirm_finite).
    By then the weights may hold the non-finite step; that is harmless, because the run ends there.
    """

    def __init__(self, step: int, loss: Tensor, norm: Tensor, outputs: dict[str, Tensor]) -> None:
        """`step`: counted from 1; `loss` and `norm` of the gradients: 0-dim, equal on all ranks; `outputs`: of this
        rank, to say which rank a non-finite number came from."""
        self._step = step
        with torch.no_grad():
            own = torch.stack([out.sum(dtype=torch.float32) for out in outputs.values()]).sum()
            numbers = torch.stack([loss.double(), norm.double(), own.double()])
        self._numbers, self._copied = _to_host(numbers)

    def confirm(self) -> None:
        """Wait for the numbers. Raises NonFinite, on all ranks, when the step was not finite."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm, own = self._numbers.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            return
        ranks = [str(rank) for rank, finite in enumerate(gather_objects(math.isfinite(own))) if not finite]
        what = f"outputs of rank {', '.join(ranks)}" if ranks else "loss or gradients"
        raise NonFinite(
            f"step {self._step}: {what} became NaN or Inf (loss {loss:g}); training ends, and this step is not "
            "saved. Lower optim.lr, warm up longer, or try train.precision=fp32"
        )


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """(a copy in host memory, the event after which it is complete; None: it is complete already)."""
    if numbers.device.type != "cuda":
        return numbers.cpu(), None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return copy, copied


@dataclass
class TrainState:
    """What a training step changes on this rank. Saved in checkpoints, except for `pending_check`."""

    model: PretrainingModel
    """The bare model, whose weights are saved."""
    engine: Engine
    """Runs that model on all ranks, and updates it."""
    views: Views | MultiCrop
    objective: Objective
    device: torch.device
    queue: MomentumQueue | None = None
    ema: WeightAverage | None = None
    stopping: EarlyStopping | None = None
    masks: WeightMasks | None = None
    """Keeps the encoder's pruned weights at zero; None where nothing was pruned."""
    gradual: GradualPruning | None = None
    """Prunes more while training; None: the masks stay as they are."""
    pending_check: FiniteCheck | None = None
    """The check of the last step for NaN and Inf, as long as it is not known to be finite."""
    step: int = 0
    """Number of completed optimizer steps."""
    last_validated_step: int = 0
    """The last step after which the run was validated. A run may leave after a step and before its validation."""

    @property
    def parallel(self) -> nn.Module:
        """The same model as the engine wraps it; its training mode is that of the run."""
        return self.engine.parallel

    def queue_columns(self) -> tuple[Tensor, Tensor] | None:
        return None if self.queue is None else self.queue.columns()

    def confirm_finite(self) -> None:
        """Wait until the last step is known to be finite. Raises NonFinite, on all ranks, now and in every later call
        when it is not: this state can no longer be saved. Collective."""
        if self.pending_check is not None:
            self.pending_check.confirm()
            self.pending_check = None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint, by file. Collective.

        Raises NonFinite where the last step was not finite.
        """
        self.confirm_finite()
        tensors = {
            "model": dict(self.model.state_dict()),
            "optimizer": self.engine.tensors(),
        }
        if objective := dict(self.objective.state_dict()):
            tensors["objective"] = objective
        if self.queue is not None:
            tensors["queue"] = dict(self.queue.state_dict())
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        if self.masks is not None:
            tensors["masks"] = self.masks.packed()
        return tensors

    def numbers(self) -> dict[str, Any]:
        """The plain values of a checkpoint, for its state.json."""
        numbers: dict[str, Any] = {
            "step": self.step,
            "last_validated_step": self.last_validated_step,
            "random_streams": seeding.VERSION,
        }
        if self.stopping is not None:
            numbers["stopping"] = self.stopping.state()
        if self.engine.scaler is not None:
            numbers["loss_scale"] = self.engine.scaler.state()
        if self.gradual is not None:
            numbers["gradual"] = self.gradual.state()
        return numbers

    def best_steps(self) -> list[int]:
        """Steps whose checkpoints are kept for good: the best one that early stopping knows."""
        return [] if self.stopping is None or self.stopping.best_at is None else [self.stopping.best_at]

    def load(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> None:
        """Continue from what `tensors` and `numbers` returned (same model, any engine, any number of ranks)."""
        self.pending_check = None
        self.model.load_state_dict(tensors["model"])
        if "masks" in tensors:  # a pruned model stays pruned, also in a run that does not prune itself
            self.masks = WeightMasks.from_packed(self.model.encoder, tensors["masks"])
        self.objective.load_state_dict(tensors.get("objective", {}))
        if self.queue is not None:
            self.queue.load_state_dict(tensors["queue"])
        if self.ema is not None:
            self.ema.load_state_dict(tensors["ema"])
        self.engine.load(tensors["optimizer"])
        if self.stopping is not None and "stopping" in numbers:
            self.stopping.load_state(numbers["stopping"])
        if self.engine.scaler is not None and "loss_scale" in numbers:
            self.engine.scaler.load_state(numbers["loss_scale"])
        if "gradual" in numbers:  # also in a run that was not told to prune
            self.gradual = GradualPruning(**numbers["gradual"])
        self.step = numbers["step"]
        self.last_validated_step = numbers.get("last_validated_step", self.step)


@dataclass(frozen=True)
class Training:
    """A training run that is ready to start: what `build_training` makes and `fit` takes."""

    state: TrainState
    options: StepOptions
    loader: Loader
    plan: TrainingPlan
    description: dict[str, Any]
    """What a checkpoint holds to build its model again, see `describe_model`."""
    weights: LoadedWeights | None = None
    """The pretrained weights that the encoder was given, if any."""
