"""The probe that trains nothing: nearest neighbors among the training rows."""

from __future__ import annotations

from typing import Any

from ..features import in_chunks
from ..fitted_probe import FittedProbe
from ..knn import Neighbors
from .base import Outcome, Task, input_of


def fit_knn(kind: str, task: Task) -> Outcome:
    """Keep the training rows. Collective."""
    settings = task.config.probe.knn
    source = input_of(kind, settings)
    train = task.inputs.whole("train", source)
    assert train is not None
    in_dim = train[0][0].numel()
    options: dict[str, Any] = {"rows": len(train[0]), "k": settings.k, "temperature": settings.temperature}
    description = {
        "kind": kind,
        "input": source,
        "classes": list(task.classes),
        "normalization": task.description["normalization"],
        "standardize": False,
        "in_dim": in_dim,
        "encoder": None,
        "head": {"name": "knn", "options": options},
    }
    head = Neighbors(in_dim, len(task.classes), **options)
    fitted = FittedProbe(description, head=head).to(task.runtime.device)
    head.fill(in_chunks(fitted.prepare, train[0]), train[1])
    return Outcome(fitted.eval(), {"k": settings.k, "temperature": settings.temperature}, facts={"iterations": None})
