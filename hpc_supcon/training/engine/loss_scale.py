"""Loss scaling for fp16: small gradients are lifted above fp16's smallest number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INITIAL = 2.0**16
LARGEST = 2.0**24
GROWTH_STEPS = 2000
MOST_SKIPS = 20
"""Skipped steps in a row that are taken for the search of a scale; one more is a run that diverged."""


class LossScale:
    """A factor on the loss that halves when gradients overflow and doubles after 2000 steps without (Micikevicius
    et al. 2018, section 3.2).

    Decided by numbers that are equal on every rank, so that it stays equal too. A power of two: it rounds nothing.
    """

    def __init__(self) -> None:
        self.scale = INITIAL
        self._good = 0
        self._in_a_row = 0
        self._skipped = 0

    def good(self) -> None:
        """After a step whose gradients were finite."""
        self._in_a_row = 0
        self._good += 1
        if self._good == GROWTH_STEPS:
            self.scale, self._good = min(2 * self.scale, LARGEST), 0

    def overflow(self) -> bool:
        """After a step whose gradients were not; False when this happened too often in a row."""
        self.scale, self._good = self.scale / 2, 0
        self._in_a_row += 1
        self._skipped += 1
        return self._in_a_row <= MOST_SKIPS

    def statistics(self) -> dict[str, float]:
        return {"loss_scale": self.scale, "skipped_steps": self._skipped}

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "good": self._good, "in_a_row": self._in_a_row, "skipped": self._skipped}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.scale = float(state["scale"])
        self._good, self._in_a_row, self._skipped = (int(state[key]) for key in ("good", "in_a_row", "skipped"))
