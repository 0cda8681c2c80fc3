"""The default engine: PyTorch's DistributedDataParallel, or a single process without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..optim import clip_gradients, set_learning_rate
from .base import EngineParts, gradients_of, load_optimizer, named_parameters, optimizer_tensors, unscale
from .placement import distribute


class DdpEngine:
    """Every rank has the whole model and optimizer. Methods: see Engine."""

    def __init__(self, parts: EngineParts) -> None:
        self.parallel = distribute(parts.model, parts.runtime, sync_bn=parts.sync_bn)
        self.scaler, self.can_accumulate = parts.scaler, True
        self._forward = parts.compile(self.parallel)
        self._parameters = named_parameters(parts.model, parts.objective)
        self._optimizer = parts.make_optimizer(list(self._parameters.values()))

    def forward(self, views: Tensor) -> dict[str, Tensor]:
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
