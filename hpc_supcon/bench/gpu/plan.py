"""The stages of `hpc-supcon bench gpu`, and how many seconds each may take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ConfigError, unknown_name

MARGIN_S = 3.0
"""Seconds before it would be killed, a stage is told to end."""


@dataclass(frozen=True)
class Stage:
    """A stage: `run(work)` of the module NAME_stage."""

    name: str
    title: str
    least: float
    """Seconds without which it measures nothing; the start of its process is some of them."""
    share: float
    """Its part of what the budget has beyond the least of every stage."""

    @property
    def file(self) -> str:
        """Name of the file with its numbers."""
        return f"{STAGES.index(self) + 1}-{self.name}.json"


STAGES = (
    Stage("machine", "Versions and ceilings", least=15, share=10),
    Stage("tests", "Tests marked cuda", least=25, share=75),
    Stage("loss", "Loss", least=15, share=105),
    Stage("step", "Training step", least=20, share=120),
    Stage("data", "Views and loaders", least=15, share=35),
    Stage("training", "End to end", least=25, share=80),
)


def chosen_stages(names: Sequence[str]) -> list[Stage]:
    """The stages of these names, all without names, in the order of STAGES. Raises ConfigError."""
    known = [stage.name for stage in STAGES]
    for name in names:
        if name not in known:
            raise ConfigError(f"--only: {unknown_name('stage', name, known)}")
    return [stage for stage in STAGES if not names or stage.name in names]


def limit(left: float, stages: Sequence[Stage]) -> float:
    """Seconds that the first of `stages` may take, of `left` seconds for all of them; 0: less than it needs.

    What a stage does not use is in `left` when the next one asks, so that all later ones share it.
    """
    first = stages[0]
    beyond = left - sum(stage.least for stage in stages)
    whole = sum(stage.share for stage in stages)
    seconds = first.least + max(0.0, beyond) * first.share / whole
    return 0.0 if left < first.least else min(seconds, left)


def check_budget(budget: float, stages: Sequence[Stage]) -> None:
    """Raise ConfigError unless every stage gets what it needs."""
    least = sum(stage.least for stage in stages)
    if not (budget >= least and math.isfinite(budget)):
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(
            f"--budget {budget:g} does not suffice: {names} need {least:g} s at least; give --budget {least:g} or "
            "more, or fewer stages with --only"
        )
