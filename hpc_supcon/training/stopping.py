"""Early stopping: when to stop, and which evaluation was the best. Pure arithmetic, no files, no ranks."""

from __future__ import annotations

from typing import Any


class EarlyStopping:
    """Watches one number per evaluation: `update` it, then read `improved` and `stop`.

    The number must be equal on all ranks (see collectives.all_sum); the decision then is as well. `monitor`
    "loss" is to fall, "accuracy" (a fraction) to rise. Without patience and target it never stops and still
    knows the best.
    """

    def __init__(
        self, monitor: str, *, patience: int | None = None, min_change: float = 0.0, target: float | None = None
    ) -> None:
        assert monitor in ("loss", "accuracy")
        self.monitor, self.patience, self.min_change, self.target = monitor, patience, min_change, target
        self._sign = -1.0 if monitor == "loss" else 1.0
        self.best: float | None = None
        """The best value seen."""
        self.best_at: int | None = None
        """Where it was seen: the `at` of its update."""
        self.without_improvement = 0
        """Evaluations in a row that did not improve on the best."""
        self.reached = False
        """Whether the target was met."""

    def update(self, value: float, at: int) -> bool:
        """Note the value of the evaluation `at` (a step or epoch); True when it is the best so far.

        NaN is no improvement.
        """
        gain = self._sign * (value - self.best) if self.best is not None else float("inf")
        improved = gain > self.min_change and value == value
        if improved:
            self.best, self.best_at, self.without_improvement = value, at, 0
        else:
            self.without_improvement += 1
        if self.target is not None and self._sign * (value - self.target) >= 0:
            self.reached = True
        return improved

    @property
    def stop(self) -> bool:
        return self.reached or (self.patience is not None and self.without_improvement >= self.patience)

    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint's state.json."""
        return {
            "best": self.best,
            "best_at": self.best_at,
            "without_improvement": self.without_improvement,
            "reached": self.reached,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.best, self.best_at = state["best"], state["best_at"]
        self.without_improvement, self.reached = state["without_improvement"], state["reached"]
