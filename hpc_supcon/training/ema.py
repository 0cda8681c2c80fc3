"""Exponential moving averages of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(own: Iterable[Tensor], target: Iterable[Tensor], decay: float) -> None:
    """own = decay own + (1 - decay) target, in place."""
    torch._foreach_lerp_(list(own), [t.detach() for t in target], 1 - decay)


class WeightAverage:
    """The average of a model's parameters over its steps, of about the last 1 / (1 - decay).

    Starts as the parameters are. BatchNorm's statistics and other buffers are the model's own: they are
    averages already.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self._average = {name: p.detach().clone() for name, p in model.named_parameters()}

    def averages(self) -> list[Tensor]:
        return list(self._average.values())

    def update(self) -> None:
        """After an optimizer step."""
        follow(self._average.values(), self._model.parameters(), self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's parameters are the average: for an evaluation during training, without gradients."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, p in self._model.named_parameters():
            p.data, self._average[name] = self._average[name], p.data

    def state_dict(self) -> dict[str, Tensor]:
        """As the model's own, with the average in the place of the parameters: any such model can load it."""
        return {**self._model.state_dict(), **self._average}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, average in self._average.items():
            average.copy_(state[name])
