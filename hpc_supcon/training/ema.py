"""Exponential moving averages of a model's weights: for evaluation, as the momentum encoder of a queue, and as the
momentum target of BYOL, MoCo and DINO."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..distributed.collectives import gather_rows_of
from ..models import PretrainingModel


@torch.no_grad()
def update_average(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """average = decay average + (1 - decay) weights, in place."""
    torch._foreach_lerp_(list(average), [t.detach() for t in weights], 1 - decay)


class WeightAverage:
    """The moving average of a model's parameters, over about the last 1 / (1 - decay) steps.

    It starts as a copy of the parameters. BatchNorm's running statistics and other buffers are not averaged: they
    are averages already.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        # parameters that are not trained are their own average
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._trained.items()}

    def update(self) -> None:
        """Call after each optimizer step."""
        update_average(self._average.values(), self._trained.values(), self.decay)

    def prune(self, masks: Mapping[str, Tensor]) -> None:
        """Set to zero where the masks, by parameter, are False: weights that were pruned in the model."""
        for name, mask in masks.items():
            if name not in self._average:
                continue
            self._average[name].masked_fill_(~mask.to(self._average[name].device), 0.0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's parameters are the average: for an evaluation during training, without gradients."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, p in self._trained.items():
            p.data, self._average[name] = self._average[name], p.data

    def state_dict(self) -> dict[str, Tensor]:
        """As the model's own, with the average in place of the parameters: any such model can load it."""
        return {**self._model.state_dict(), **self._average}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, average in self._average.items():
            average.copy_(state[name])


class MomentumTarget(nn.Module):
    """A copy of the encoder and its projection that follows the model, and whose embeddings a loss aims at.

    target = m target + (1 - m) model after every step, m = `momentum(step)`. It gets no gradient; its BatchNorm
    statistics are its own.
    """

    def __init__(self, model: PretrainingModel, momentum: Callable[[int], float]) -> None:
        """`momentum`: of a step, counted from 0, in 0..1."""
        super().__init__()
        projection = model.heads["projection"]
        frozen = tuple(name for name in model.frozen_norms if name.startswith(("encoder.", "heads.projection.")))
        copied = copy.deepcopy(PretrainingModel(model.encoder, {"projection": projection}, frozen_norms=frozen))
        self.network = copied.requires_grad_(False)
        self._momentum = momentum

    @torch.no_grad()
    def embeddings(self, model: nn.Module, views: Tensor) -> Tensor:
        """Projections [B, V, D] of views [B, V, C, H, W], with BatchNorm in the mode in which `model` is."""
        if self.network.training != model.training:
            self.network.train(model.training)
        projections: Tensor = self.network(views)["projection"]
        return projections

    def update(self, model: PretrainingModel, step: int, also: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """Call after the optimizer step number `step`, counted from 0. also: more (averages, weights)."""
        online = [*model.encoder.parameters(), *model.heads["projection"].parameters(), *(w for _, w in also)]
        average = [*self.network.parameters(), *(a for a, _ in also)]
        update_average(average, online, self._momentum(step))


def momentum_at(step: int, *, base: float, final: float | None, steps: int) -> float:
    """The momentum of a step, counted from 0: from `base` to `final` by half a cosine over `steps`.

    Grill et al. 2020, BYOL, section 3.3. With `final` None it is `base` in every step.
    """
    if final is None:
        return base
    return final - (final - base) * (math.cos(math.pi * min(step / steps, 1.0)) + 1) / 2


class MomentumQueue(nn.Module):
    """A queue of the newest `size` keys of all ranks, with their labels (He et al. 2020, MoCo).

    They are extra columns of the loss, without gradient, and equal on every rank. Keys are projections made by a
    momentum encoder, a copy of the model whose weights are the moving average copy = m copy + (1 - m) model
    (`momentum` m), or by the model itself when `momentum` is None. The queue holds those of each image's first view;
    `of_batch`: the loss compares with those of all views of its batch too, in place of the model's own.
    """

    features: Tensor
    labels: Tensor
    pushed: Tensor

    def __init__(
        self, model: PretrainingModel, size: int, dim: int, momentum: float | None, *, of_batch: bool = False
    ) -> None:
        super().__init__()
        self.momentum, self.of_batch = momentum, of_batch
        self.key_model = copy.deepcopy(model).requires_grad_(False) if momentum is not None else None
        device = next(model.parameters()).device
        self.register_buffer("features", torch.zeros(size, dim, device=device))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64, device=device))
        # number of keys since the start, kept on the CPU; modulo the size it is the place of the next one
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def columns(self) -> tuple[Tensor, Tensor] | None:
        """(features [k, D], labels [k]) of the keys in the queue, None before the first push."""
        filled = min(int(self.pushed), len(self.labels))
        return (self.features[:filled], self.labels[:filled]) if filled else None

    @torch.no_grad()
    def keys(self, views: Tensor, outputs: Tensor) -> Tensor:
        """Keys [B, 1, D] of views [B, V, C, H, W], of which `outputs` [B, V, D] are the model's projections; those of
        all views, [B, V, D], with `of_batch`."""
        if self.key_model is None:
            return outputs[:, :1].detach()
        keys: Tensor = self.key_model(views if self.of_batch else views[:, :1])["projection"]
        return keys

    @torch.no_grad()
    def push(self, keys: Tensor, labels: Tensor, images_per_rank: list[int] | None = None) -> None:
        """Replace the oldest keys by the first of the keys [B, V, D] of each image of all ranks. Collective.

        images_per_rank: B of every rank, where it is known (saves a message and a wait for the device).
        """
        keys, labels = gather_rows_of([keys[:, 0].to(self.features.dtype), labels], images_per_rank)
        size = len(self.labels)
        start = int(self.pushed) + max(0, len(keys) - size)
        keys, labels = keys[-size:], labels[-size:]
        places = torch.arange(start, start + len(keys), device=keys.device).remainder(size)
        self.features.index_copy_(0, places, keys)
        self.labels.index_copy_(0, places, labels)
        self.pushed.fill_(start + len(keys))

    def update_key_model(self, model: nn.Module) -> None:
        """Move the momentum encoder's weights, after each optimizer step. Its BatchNorm statistics are its own."""
        if self.key_model is not None and self.momentum is not None:
            update_average(self.key_model.parameters(), model.parameters(), self.momentum)
