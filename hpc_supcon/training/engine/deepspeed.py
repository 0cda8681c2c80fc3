"""The engine on DeepSpeed: ZeRO 0 (nothing partitioned), 1 (the optimizer's state), 2 (gradients as well).

Schedule, clipping and the check of gradients are this package's own, as with the other engine; DeepSpeed averages
gradients and partitions the optimizer. It trains fp32 weights (see deepspeed_settings).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...data import ImageViews
from ...distributed.launch import Launch
from ...errors import ConfigError
from ..optim import set_learning_rate
from .base import (
    EngineParts,
    clip_gradients,
    gradients_of,
    load_optimizer,
    named_parameters,
    optimizer_tensors,
    unscale,
)
from .deepspeed_settings import deepspeed_settings
from .zero import Partitions


class DeepSpeedEngine:
    """DeepSpeed's engine around the model; the loss's own parameters have a separate optimizer. Methods: see Engine.

    `user_config`: `train.deepspeed.config`. Raises ConfigError for what DeepSpeed refuses in it.
    """

    def __init__(
        self, parts: EngineParts, *, zero: int, user_config: Mapping[str, Any] | None, images_per_rank: int
    ) -> None:
        model, self.scaler, self.can_accumulate = parts.model, parts.scaler, zero < 2
        self._model = model
        for p in model.parameters():  # DeepSpeed flattens and sends them; channels_last inputs keep convolutions fast
            p.data = p.data.contiguous()
        self._parameters = named_parameters(model, nn.Module())
        self._objective = named_parameters(nn.Module(), parts.objective)
        self._optimizer = parts.make_optimizer(list(self._parameters.values()))
        self._objective_optimizer = parts.make_optimizer(list(self._objective.values())) if self._objective else None
        settings = deepspeed_settings(
            user_config,
            zero=zero,
            images_per_rank=images_per_rank,
            parameters=sum(p.numel() for p in self._parameters.values()),
            scaled=parts.scaler is not None,
        )
        self._engine = _initialize(_CompiledForward(model, parts.compile(model)), self._optimizer, settings, parts)
        self.parallel: nn.Module = self._engine.module
        self._partitions = Partitions(self._engine.optimizer, self._parameters) if zero else None
        # without synchronized statistics all ranks take rank 0's, as under DDP
        self._broadcast_buffers = parts.runtime.world_size > 1 and not parts.sync_bn

    def forward(self, views: ImageViews) -> dict[str, Tensor]:
        if self._broadcast_buffers and self.parallel.training:
            _broadcast_from_rank_0(list(self._model.buffers()))
        return self._engine(views)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else loss * self.scaler.scale

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def gradient_norm(self) -> Tensor:
        gradients, others = self._gradients()
        unscale([*gradients, *others], self.scaler)
        if self._partitions is None:
            return torch.nn.utils.get_total_norm([*gradients, *others])
        squares = [self._partitions.squared_norm(), *(g.square().sum() for g in others)]
        return torch.stack(squares).sum().sqrt()

    def step(self, norm: Tensor, clip_norm: float | None) -> None:
        if clip_norm is not None:
            gradients, others = self._gradients()
            clip_gradients([*gradients, *others], norm, clip_norm)
        self._engine.step()
        if self._objective_optimizer is not None:
            self._objective_optimizer.step()
            self._objective_optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.after_finite_step()

    def skip_step(self) -> bool:
        if self.scaler is None:
            return False
        if self._partitions is None:
            self._engine.zero_grad()
        else:
            self._engine.step()  # it detects the overflow too, and resets its buffers
            assert not self._engine.was_step_applied()
        if self._objective_optimizer is not None:
            self._objective_optimizer.zero_grad(set_to_none=True)
        return self.scaler.after_overflow()

    def set_learning_rate(self, lr: float) -> None:
        for optimizer in (self._optimizer, self._objective_optimizer):
            if optimizer is not None:
                set_learning_rate(optimizer, lr)

    def statistics(self) -> dict[str, float]:
        return {} if self.scaler is None else self.scaler.statistics()

    def tensors(self) -> dict[str, Tensor]:
        if self._partitions is None:
            tensors = optimizer_tensors(self._parameters, self._optimizer)
        else:
            tensors = self._partitions.tensors()
        if self._objective_optimizer is not None:
            tensors |= optimizer_tensors(self._objective, self._objective_optimizer)
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        own = {name: t for name, t in tensors.items() if name.rpartition("/")[0] in self._objective}
        others = {name: t for name, t in tensors.items() if name not in own}
        if self._objective_optimizer is not None:
            load_optimizer(self._objective, self._objective_optimizer, own)
        if self._partitions is None:
            load_optimizer(self._parameters, self._optimizer, others)
        else:
            self._partitions.load(others)

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """(gradients of the model on this rank, gradients of the loss's own parameters)."""
        parts = self._partitions
        gradients = gradients_of(self._parameters.values()) if parts is None else parts.gradients()
        return gradients, gradients_of(self._objective.values())


class _CompiledForward(nn.Module):
    """`model` with the forward pass `forward`, a compiled form that does not change the names of its parameters."""

    def __init__(self, model: nn.Module, forward: Callable[..., dict[str, Tensor]]) -> None:
        super().__init__()
        self.model = model
        self._forward = [forward]  # in a list: a module would be registered as a child

    def forward(self, views: ImageViews) -> dict[str, Tensor]:
        return self._forward[0](views)


def _broadcast_from_rank_0(tensors: list[Tensor]) -> None:
    """Copy rank 0's tensors to all ranks, in one message for each dtype."""
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.broadcast(flat, 0)
        parts = flat.split([t.numel() for t in same])
        torch._foreach_copy_(same, [part.view_as(t) for part, t in zip(parts, same, strict=True)])


def _initialize(
    module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], parts: EngineParts
) -> Any:
    """DeepSpeed's own engine. Raises ConfigError."""
    device = parts.runtime.device
    if not dist.is_initialized():  # a single process
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    with _environment(parts.runtime.launch, device):
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfigError

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # PyTorch warns about DeepSpeed in every step; users of this package cannot change it
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        # this extension would be compiled at the first start; gloo serves as well
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        try:
            return deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[
                0
            ]
        except (ValueError, TypeError, KeyError, AssertionError, DeepSpeedConfigError) as error:
            lines = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"train.deepspeed.config: DeepSpeed refuses it: {lines}") from error


@contextmanager
def _environment(launch: Launch, device: torch.device) -> Iterator[None]:
    """Inside, the environment variables that DeepSpeed reads when it starts are set."""
    local_rank = device.index if device.index is not None else launch.local_rank
    ours = {"DS_ACCELERATOR": device.type, "LOCAL_RANK": str(local_rank)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
