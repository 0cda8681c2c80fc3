"""Probes by name: what an encoder's features, or the pixels, tell a classifier about the classes."""

from __future__ import annotations

from collections.abc import Callable

from .base import Outcome, Task
from .finetune import fit_finetune
from .heads import fit_head
from .knn import fit_knn

__all__ = ["PROBES", "Outcome", "Task"]

PROBES: dict[str, Callable[[str, Task], Outcome]] = {
    "linear": fit_head,
    "softmax": fit_head,
    "logistic": fit_head,
    "mlp": fit_head,
    "knn": fit_knn,
    "finetune": fit_finetune,
}
"""`probe.kind` -> fit(kind, task), collective."""
