"""What an engine is, and what engines share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ...distributed.launch import Runtime
from ...errors import CheckpointCorrupt
from ...models import PretrainingModel
from .loss_scale import LossScale

Compile = Callable[[Callable[..., dict[str, Tensor]]], Callable[..., dict[str, Tensor]]]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Parts:
    """What every engine is built from. `compile` makes the forward pass a faster one of the same meaning."""

    model: PretrainingModel
    objective: nn.Module
    runtime: Runtime
    make_optimizer: MakeOptimizer
    sync_bn: bool
    compile: Compile
    scaler: LossScale | None = None
    """For fp16 only."""


class Engine(Protocol):
    """Trains one model on all ranks: a step is forward, scaled, backward, gradient_norm, then step or skip.

    All but `forward` is called by all ranks in the same order. Losses give gradients whose average over ranks is
    that of the global batch; `backward` takes it.
    """

    parallel: nn.Module
    """What `forward` runs, to be put into training mode; the bare model is inside."""
    scaler: LossScale | None
    takes_pieces: bool
    """Whether gradients of several passes can be added up before they are exchanged."""

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        """The model's outputs for views [B, V, C, H, W]."""
        ...

    def no_exchange(self) -> AbstractContextManager[None]:
        """Inside, `backward` adds to this rank's gradients; the first one outside averages the sum over ranks."""
        ...

    def scaled(self, loss: Tensor) -> Tensor:
        """What to take gradients of in the place of `loss` (0-dim)."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss` (0-dim), a function of what `forward` gave."""
        ...

    def gradient_norm(self) -> Tensor:
        """Global norm (0-dim, equal on all ranks) of the gradients of all that is trained; not finite if one is."""
        ...

    def step(self, norm: Tensor, clip_norm: float | None) -> None:
        """Update, with gradients scaled down to the norm `clip_norm`, and forget them."""
        ...

    def skip(self) -> bool:
        """Forget gradients that overflowed; False where that is no matter of the loss's scale."""
        ...

    def set_learning_rate(self, lr: float) -> None: ...

    def statistics(self) -> dict[str, float]:
        """Numbers for the log."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as `parameter/slot` -> tensor, the same under every engine. Collective."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors`, after the model's own weights have been loaded. Collective."""
        ...


def named_parameters(model: nn.Module, objective: nn.Module) -> dict[str, nn.Parameter]:
    """All that is trained, by the names of the checkpoint: the model's, then the loss's own."""
    own = {f"objective.{name}": p for name, p in objective.named_parameters()}
    every = dict(model.named_parameters()) | own
    return {name: p for name, p in every.items() if p.requires_grad}


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def unscale(gradients: Sequence[Tensor], scaler: LossScale | None) -> None:
    if scaler is not None and gradients:
        torch._foreach_mul_(list(gradients), 1 / scaler.scale)


def optimizer_tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`parameter/slot` -> tensor: safetensors holds names and tensors, no nested objects."""
    slots = [(name, optimizer.state[p]) for name, p in parameters.items() if p in optimizer.state]
    return {f"{name}/{key}": t for name, state in slots for key, t in state.items() if isinstance(t, Tensor)}


def load_optimizer(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """What `optimizer_tensors` gave, back into `optimizer`. Raises CheckpointCorrupt."""
    optimizer.state.clear()
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise CheckpointCorrupt(f"optimizer.safetensors: {full_name}: the model has no such parameter")
        optimizer.state[parameters[name]][key] = like_slot(parameters[name], key, value, optimizer)


def like_slot(p: Tensor, key: str, value: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """`value` where and as the optimizer wants the slot `key` of p."""
    if key == "step":  # counted on the CPU, but for fused kernels
        return value.to(p.device, copy=True) if optimizer.defaults.get("fused") else value.clone()
    return torch.empty_like(p, dtype=value.dtype).copy_(value)  # its parameter's device and memory layout
