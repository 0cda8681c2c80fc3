"""The default engine: PyTorch's DistributedDataParallel, or a single process without it."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...data import ImageViews
from ...distributed.launch import Runtime
from ...models import synchronize_batchnorm
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

# renamed in PyTorch 2.15
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_BUFFER_SYNC = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"


class DdpEngine:
    """Every rank has the whole model and optimizer. Methods: see Engine."""

    def __init__(self, parts: EngineParts) -> None:
        self.parallel = distribute(parts.model, parts.runtime, sync_bn=parts.sync_bn)
        self.scaler, self.can_accumulate = parts.scaler, True
        self._forward = parts.compile(self.parallel)
        self._parameters = named_parameters(parts.model, parts.objective)
        self._optimizer = parts.make_optimizer(list(self._parameters.values()))

    def forward(self, views: ImageViews) -> dict[str, Tensor]:
        return self._forward(views)

    def no_sync(self) -> AbstractContextManager[None]:
        return self.parallel.no_sync() if isinstance(self.parallel, DistributedDataParallel) else nullcontext()

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else loss * self.scaler.scale

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradient_norm(self) -> Tensor:
        gradients = gradients_of(self._parameters.values())
        unscale(gradients, self.scaler)
        return torch.nn.utils.get_total_norm(gradients)

    def step(self, norm: Tensor, clip_norm: float | None) -> None:
        if clip_norm is not None:
            clip_gradients(gradients_of(self._parameters.values()), norm, clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.after_finite_step()

    def skip_step(self) -> bool:
        self._optimizer.zero_grad(set_to_none=True)
        return self.scaler is not None and self.scaler.after_overflow()

    def set_learning_rate(self, lr: float) -> None:
        set_learning_rate(self._optimizer, lr)

    def statistics(self) -> dict[str, float]:
        return {} if self.scaler is None else self.scaler.statistics()

    def tensors(self) -> dict[str, Tensor]:
        return optimizer_tensors(self._parameters, self._optimizer)

    def load(self, tensors: dict[str, Tensor]) -> None:
        load_optimizer(self._parameters, self._optimizer, tensors)


def distribute(model: nn.Module, runtime: Runtime, *, sync_bn: bool) -> nn.Module:
    """Wrap `model` for data-parallel training: gradients are averaged over ranks in backward."""
    if runtime.world_size == 1:
        return model
    options: dict[str, Any] = {"gradient_as_bucket_view": True}
    if runtime.device.type == "cuda":
        options["device_ids"] = [runtime.device]
    if torch.are_deterministic_algorithms_enabled() and runtime.world_size > 2:
        # Otherwise DDP rebuilds its buckets in the second step of a process, in the order in which gradients became
        # ready in the first one. The order in which an all-reduce of three or more ranks adds depends on the position
        # in a bucket, so that the first step after a resume would round differently.
        options["find_unused_parameters"] = True
    if sync_bn:
        model = synchronize_batchnorm(model, runtime.device)  # changes nothing after `place` with sync_bn
        options[_BUFFER_SYNC] = False  # synchronized statistics are equal on all ranks
    return DistributedDataParallel(model, **options)
