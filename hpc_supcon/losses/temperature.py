"""The temperature of the contrastive losses: its range, and a learned one that stays in it without being read.

Backend and dtype depend on the temperature. Reading a learned one in every step would make the host wait for the
device, so they are chosen by a bound that the host knows, and the temperature is kept above it on the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

# Sums of exp(1 / temperature) over millions of columns stay in the range of fp32 down to the first, in that of fp64
# down to the second.
FP32_TEMPERATURE = 0.025
MIN_TEMPERATURE = 0.002


def check_temperature(tau: float) -> None:
    """ConfigError unless tau is a finite number of at least MIN_TEMPERATURE."""
    if not (math.isfinite(tau) and tau > 0):
        raise ConfigError(f"temperature must be positive and finite; got {tau}")
    if tau < MIN_TEMPERATURE:
        raise ConfigError(f"temperature {tau} is below {MIN_TEMPERATURE}, where exp(1 / temperature) overflows")


def least_temperature(tau: float) -> float:
    """The least value of a temperature that is learned from tau on: training never changes its dtype."""
    return FP32_TEMPERATURE if tau >= FP32_TEMPERATURE else MIN_TEMPERATURE


def at_least(temperature: Tensor, least: float) -> Tensor:
    """max(temperature, least), 0-dim; NaN stays NaN.

    A temperature at or below `least` receives a gradient only where a step against it raises the temperature:
    clamp's gradient of zero would hold it there for good.
    """
    found: Tensor = _AtLeast.apply(temperature, least)
    return found


class _AtLeast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, temperature: Tensor, least: float) -> Tensor:
        ctx.save_for_backward(temperature)
        ctx.least = least
        return temperature.clamp(min=least)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (temperature,) = ctx.saved_tensors
        return torch.where(temperature > ctx.least, grads[0], grads[0].clamp(max=0.0)), None
