"""Everything that must survive: what a training step changes, and its way to and from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Views
from ..distributed.collectives import gather_rows, rank
from ..models import PretrainingModel
from ..pruning import WeightMasks
from .ema import WeightAverage
from .engine import Engine
from .finite_check import Guard
from .momentum import MomentumQueue
from .objective import Objective
from .stopping import EarlyStopping


@dataclass
class TrainState:
    """The parts of one training run on this rank. Only `step` is ever rebound, and `masks` by `load`."""

    model: PretrainingModel
    """The bare model: what is saved."""
    engine: Engine
    """Runs that model on all ranks, and updates it."""
    views: Views
    objective: Objective
    autocast: Callable[[], AbstractContextManager[object]]
    device: torch.device
    queue: MomentumQueue | None = None
    ema: WeightAverage | None = None
    clip_norm: float | None = None
    """Largest global norm of the gradients that the optimizer sees; None: any."""
    micro_batch_size: int | None = None
    """Images per piece of the two-pass step; None for one pass."""
    images_per_rank: list[int] | None = None
    """Images of every rank's batch, the same in every step; None: the ranks agree on them anew in each."""
    stopping: EarlyStopping | None = None
    """What early stopping has seen; None without it."""
    masks: WeightMasks | None = None
    """The encoder's pruned weights, held at zero; None where nothing was pruned."""
    guard: Guard = field(default_factory=lambda: Guard(torch.device("cpu")))
    step: int = 0
    """Optimizer steps done."""
    last_validated_step: int = 0
    """The last step that validation has last_validated_step at; a run may leave between a step and its look."""

    @property
    def parallel(self) -> nn.Module:
        """The same model as the engine wraps it, in training or evaluation mode."""
        return self.engine.parallel

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained: the model's, then the loss's own (a learned temperature)."""
        return [p for module in (self.model, self.objective) for p in module.parameters() if p.requires_grad]

    def queue_columns(self) -> tuple[Tensor, Tensor] | None:
        return None if self.queue is None else self.queue.columns()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by checkpoint file. Collective: every rank's generators are in `rng`.

        Raises NonFinite where the last step was not finite: nothing of it is saved.
        """
        self.guard.settle()
        tensors = {
            "model": dict(self.model.state_dict()),
            "optimizer": self.engine.tensors(),
            "rng": self._rng(),
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
        """The plain part of a checkpoint: what `tensors` does not hold."""
        numbers: dict[str, Any] = {"step": self.step, "last_validated_step": self.last_validated_step}
        if self.stopping is not None:
            numbers["stopping"] = self.stopping.state()
        if self.engine.scaler is not None:
            numbers["loss_scale"] = self.engine.scaler.state()
        return numbers

    def best_steps(self) -> list[int]:
        """Steps whose checkpoints must outlive newer ones: the best that early stopping has seen."""
        return [] if self.stopping is None or self.stopping.best_at is None else [self.stopping.best_at]

    def load(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> None:
        """Go back to what `tensors` and `numbers` returned (same model, any engine). Ranks that did not exist then
        keep their generators as they are."""
        self.model.load_state_dict(tensors["model"])
        if "masks" in tensors:  # a pruned model stays pruned, whoever goes on with it
            self.masks = WeightMasks.from_packed(self.model.encoder, tensors["masks"])
        self.objective.load_state_dict(tensors.get("objective", {}))
        if self.queue is not None:
            self.queue.load_state_dict(tensors["queue"])
        if self.ema is not None:
            self.ema.load_state_dict(tensors["ema"])
        self.engine.load(tensors["optimizer"])
        own = {name.partition(".")[2]: t for name, t in tensors["rng"].items() if name.startswith(f"rank{rank()}.")}
        if own:  # a rank that did not exist when this was saved has none
            torch.set_rng_state(own["torch"])
            self.views.load_state(own["views"])
        if "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], self.device)
        if self.stopping is not None and "stopping" in numbers:
            self.stopping.load_state(numbers["stopping"])
        if self.engine.scaler is not None and "loss_scale" in numbers:
            self.engine.scaler.load_state(numbers["loss_scale"])
        self.step = numbers["step"]
        self.last_validated_step = numbers.get("last_validated_step", self.step)

    def changing(self) -> list[Tensor]:
        """All tensors on the device that a step may change: what of a step that was not finite is taken back."""
        modules = [m for m in (self.model, self.objective, self.queue) if m is not None]
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        tensors += self.engine.tensors().values()
        tensors += [] if self.ema is None else self.ema.averages()
        return [t.detach() for t in tensors if t.device.type == self.device.type and t.numel()]

    def _rng(self) -> dict[str, Tensor]:
        own = {"torch": torch.get_rng_state(), "views": self.views.state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        gathered = {name: gather_rows(state[None].cpu()) for name, state in own.items()}
        return {f"rank{r}.{name}": row for name, rows in gathered.items() for r, row in enumerate(rows)}
