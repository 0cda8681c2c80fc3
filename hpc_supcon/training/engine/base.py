"""What an engine is, and what the engines share: device, number format, gradients, the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...data import ImageViews
from ...distributed.launch import Runtime, has_fast_bf16
from ...errors import CheckpointCorrupt
from ...models import PretrainingModel, synchronize_batchnorm

Compile = Callable[[Callable[..., dict[str, Tensor]]], Callable[..., dict[str, Tensor]]]
"""A forward pass -> a compiled one."""
M = TypeVar("M", bound=nn.Module)
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

INITIAL_SCALE = 2.0**16
LARGEST_SCALE = 2.0**24
GROWTH_STEPS = 2000
MOST_SKIPS = 20
"""Skipped steps in a row that count as the search for a scale; after one more, training has diverged."""


class LossScale:
    """A factor on the loss that keeps small gradients above the smallest fp16 number.

    It halves when gradients overflow and doubles after 2000 steps without an overflow (Micikevicius et al. 2018,
    section 3.2). It depends on numbers that are equal on every rank, so it is equal on every rank as well. As a power
    of two it causes no rounding.
    """

    def __init__(self) -> None:
        self.scale = INITIAL_SCALE
        self._good = 0
        self._in_a_row = 0
        self._skipped = 0

    def after_finite_step(self) -> None:
        """Call after a step whose gradients were finite."""
        self._in_a_row = 0
        self._good += 1
        if self._good == GROWTH_STEPS:
            self.scale, self._good = min(2 * self.scale, LARGEST_SCALE), 0

    def after_overflow(self) -> bool:
        """Call after a step whose gradients were not finite; False when this happened too often in a row."""
        self.scale, self._good = self.scale / 2, 0
        self._in_a_row += 1
        self._skipped += 1
        return self._in_a_row <= MOST_SKIPS

    def statistics(self) -> dict[str, float]:
        """Numbers for the log."""
        return {"loss_scale": self.scale, "skipped_steps": self._skipped}

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint's state.json."""
        return {"scale": self.scale, "good": self._good, "in_a_row": self._in_a_row, "skipped": self._skipped}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.scale = float(state["scale"])
        self._good, self._in_a_row, self._skipped = (int(state[key]) for key in ("good", "in_a_row", "skipped"))


@dataclass(frozen=True)
class EngineParts:
    """What every engine is built from."""

    model: PretrainingModel
    objective: nn.Module
    runtime: Runtime
    make_optimizer: MakeOptimizer
    sync_bn: bool
    compile: Compile
    scaler: LossScale | None = None
    """For fp16 only."""


class Engine(Protocol):
    """Trains one model on all ranks. The order of calls in a step: forward, scale_loss, backward, gradient_norm, then
    step or skip_step.

    All methods but `forward` are called by all ranks in the same order. The average over ranks of the gradients of
    their losses is the gradient of the global batch; `backward` computes this average.
    """

    parallel: nn.Module
    """The module that `forward` runs, to be set to training mode; it contains the bare model."""
    scaler: LossScale | None
    can_accumulate: bool
    """Whether gradients of several passes can be accumulated before they are averaged over ranks."""

    def forward(self, views: ImageViews) -> dict[str, Tensor]:
        """The model's outputs for views [B, V, C, H, W], of one size or several."""
        ...

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, `backward` adds to this rank's gradients; the first one outside averages the sums over ranks."""
        ...

    def scale_loss(self, loss: Tensor) -> Tensor:
        """`loss` (0-dim) times the loss scale: what `backward` takes."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss` (0-dim), a function of the outputs of `forward`."""
        ...

    def gradient_norm(self) -> Tensor:
        """Global norm (0-dim, equal on all ranks) of the gradients of all trained parameters; not finite if one of
        them is not."""
        ...

    def step(self, norm: Tensor, clip_norm: float | None) -> None:
        """Update the parameters with gradients clipped to the norm `clip_norm`, and reset the gradients.

        `norm`: what `gradient_norm` returned.
        """
        ...

    def skip_step(self) -> bool:
        """Reset gradients that overflowed; False where another loss scale cannot help."""
        ...

    def set_learning_rate(self, lr: float) -> None: ...

    def statistics(self) -> dict[str, float]:
        """Numbers for the log."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as `parameter/slot` -> tensor, in the same form for every engine. Collective."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors`; call after the model's own weights were loaded. Collective."""
        ...


def place(
    model: M, runtime: Runtime, *, channels_last: bool = False, sync_bn: bool = False, compiled: bool = False
) -> M:
    """Move `model` to this rank's device, and to the memory layout.

    sync_bn: make BatchNorm span all ranks already here, for a model that is copied before `distribute`. compiled: in
    a form that torch.compile traces.
    """
    layout = torch.channels_last if channels_last else torch.preserve_format
    placed = model.to(runtime.device).to(memory_format=layout)
    if sync_bn and runtime.world_size > 1:
        synchronize_batchnorm(placed, runtime.device, compiled=compiled)
    return placed


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The number format of the forward pass: `auto` is bf16 where the device computes it natively, else fp32.

    Training in `fp16` needs a scaled loss (see LossScale).
    """
    if precision == "fp16":
        return torch.autocast(device.type, dtype=torch.float16)
    if precision == "bf16" or (precision == "auto" and has_fast_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def loss_precision(device: torch.device, loss: str, training: str) -> str:
    """`loss.precision` for embeddings of a model that trains in `training` (train.precision): `auto` is bf16 where
    the forward pass is bf16 or fp16. The loss itself is computed outside of autocast, from fp32 embeddings."""
    half = not isinstance(autocast(device, training), nullcontext)
    return "bf16" if loss == "auto" and half else loss


def unscaled(precision: str) -> str:
    """`precision` for training without loss scaling: `auto` in place of fp16."""
    return "auto" if precision == "fp16" else precision


def compiler(*, enabled: bool, cuda_graphs: bool) -> Compile:
    """A function that compiles the forward pass of a module; the module itself stays as it is.

    Every shape is compiled by itself (`dynamic=False`): training has one, or two where the last piece of a batch is
    smaller. cuda_graphs: replay the pass as CUDA graphs, which need shapes that never change.
    """
    if not enabled:
        return lambda call: call
    if not cuda_graphs:
        return lambda call: torch.compile(call, dynamic=False)

    def graphed(call: Any) -> Any:
        replay = torch.compile(call, dynamic=False, mode="reduce-overhead")

        def run(*args: Any) -> Any:
            # the outputs of the last step's graphs may be overwritten from here on
            torch.compiler.cudagraph_mark_step_begin()
            return replay(*args)

        return run

    return graphed


def named_parameters(model: nn.Module, objective: nn.Module) -> dict[str, nn.Parameter]:
    """All trained parameters by their names in a checkpoint: the model's, then the loss's own."""
    own = {f"objective.{name}": p for name, p in objective.named_parameters()}
    both = dict(model.named_parameters()) | own
    return {name: p for name, p in both.items() if p.requires_grad}


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def unscale(gradients: Sequence[Tensor], scaler: LossScale | None) -> None:
    """Divide `gradients` by the loss scale, in place."""
    if scaler is not None and gradients:
        torch._foreach_mul_(list(gradients), 1 / scaler.scale)


def clip_gradients(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scale `gradients` in place so that their global norm, now `norm` (0-dim), is at most `limit`.

    As torch.nn.utils.clip_grad_norm_, with a norm that is known already. The host does not wait for the device.
    """
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))


def optimizer_tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`parameter/slot` -> tensor: safetensors files hold names and tensors, no nested objects."""
    slots = [(name, optimizer.state[p]) for name, p in parameters.items() if p in optimizer.state]
    return {f"{name}/{key}": t for name, state in slots for key, t in state.items() if isinstance(t, Tensor)}


def load_optimizer(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Load what `optimizer_tensors` returned into `optimizer`. Raises CheckpointCorrupt."""
    optimizer.state.clear()
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise CheckpointCorrupt(f"optimizer.safetensors: {full_name}: the model has no such parameter")
        optimizer.state[parameters[name]][key] = like_slot(parameters[name], key, value, optimizer)


def like_slot(p: Tensor, key: str, value: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """`value` on the device and in the memory layout that the optimizer's slot `key` of p has."""
    if key == "step":  # on the CPU, except for fused kernels
        return value.to(p.device, copy=True) if optimizer.defaults.get("fused") else value.clone()
    return torch.empty_like(p, dtype=value.dtype).copy_(value)
