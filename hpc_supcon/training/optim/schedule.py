"""Learning-rate schedules: pure functions of the step, so that a resumed run needs nothing but its step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...errors import ConfigError, unknown_name

SCHEDULES = ("cosine", "step", "constant", "one_cycle")
ONE_CYCLE_START = 1 / 25
"""A one-cycle schedule starts at this fraction of the peak (1 / OneCycleLR's div_factor)."""


def learning_rate(
    step: int,
    *,
    peak: float,
    steps: int,
    warmup_steps: int,
    schedule: str,
    final_fraction: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 1.0,
) -> float:
    """The learning rate of `step` (counted from 0) of `steps`. Raises ConfigError for an unknown schedule.

    After a linear warm-up (peak / warmup_steps, ..., peak):
        cosine     from peak, in the first step, to final_fraction * peak, in the last one
        step       times gamma at each milestone (fraction of `steps`)
        constant   peak
    one_cycle (Smith and Topin 2018): half a cosine up to the peak during the warm-up, then half a cosine down to
    final_fraction * peak in the last step.
    """
    if schedule == "one_cycle":
        top = max(0, warmup_steps - 1)  # the step at the peak
        if step < top:
            return peak * _half_cosine(ONE_CYCLE_START, 1.0, step / top)
        return peak * _half_cosine(1.0, final_fraction, (step - top) / max(1, steps - 1 - top))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "cosine":
        return peak * _half_cosine(1.0, final_fraction, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    if schedule == "step":
        return peak * gamma ** sum(step >= round(m * steps) for m in milestones)
    if schedule == "constant":
        return peak
    raise ConfigError("optim.schedule: " + unknown_name("schedule", schedule, SCHEDULES))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
