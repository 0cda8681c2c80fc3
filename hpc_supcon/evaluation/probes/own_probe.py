"""Probes of a user's own, such as scikit-learn's classifiers: anything with `fit` and `predict`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Splits
from ...errors import PartError
from ...parts import find, run
from ...seeding import stream
from .base import FittedProbe, ProbeOutcome, ProbeSpec, ProbeTask
from .training import seeded

SURE = 10.0
"""Logit of the class that a probe without scores predicts; of the others it is 0."""


class OwnHead(nn.Module):
    """features [n, D] -> logits [n, classes] of a fitted object of a user's own.

    Logits are the logarithm of `predict_proba(features)` where it has that, a matrix [n, classes] of probabilities;
    else what `predict(features)` returns, logits [n, classes] or the numbers of classes [n]. Both get and may return
    tensors on the CPU, or what NumPy reads as arrays.
    """

    def __init__(self, where: str, fitted: Any, classes: int) -> None:
        super().__init__()
        self._where, self.fitted, self._classes = where, fitted, classes

    def forward(self, features: Tensor) -> Tensor:
        has_probabilities = hasattr(self.fitted, "predict_proba")
        call = self.fitted.predict_proba if has_probabilities else self.fitted.predict
        found = run(self._where, call, features.detach().cpu())
        values = run(self._where, lambda: torch.as_tensor(np.asarray(found))).to(features.device)
        n, classes = len(features), self._classes
        if has_probabilities and values.shape == (n, classes):
            return values.float().clamp(min=torch.finfo(torch.float32).tiny).log()
        if not has_probabilities and values.shape == (n, classes) and values.is_floating_point():
            return values.float()
        in_range = (
            not values.is_floating_point()
            and values.shape == (n,)
            and bool(((values >= 0) & (values < classes)).all())
        )
        if not has_probabilities and in_range:
            return SURE * F.one_hot(values.long(), classes).float()
        name = "predict_proba" if has_probabilities else "predict"
        raise PartError(
            f"{self._where}: {name} returned {values.dtype} {list(values.shape)} for {n} rows and {classes} classes: "
            + (
                "give probabilities [n, classes]"
                if has_probabilities
                else "give classes 0.. [n], or logits [n, classes]"
            )
        )


def _check(section: str, settings: Mapping[str, Any], splits: Splits) -> None:
    """Raise PartError for an object that cannot be made, or has no `fit` and `predict`. settings: its options."""
    _make(section.removeprefix("probe."), settings)


def _make(kind: str, options: Any) -> tuple[str, Any]:
    part = find("probes", kind)
    assert part is not None
    made = part.build(options)
    for name in ("fit", "predict"):
        if not callable(getattr(made, name, None)):
            raise PartError(
                f"{part.where}: returned {type(made).__name__}, which has no method {name}: a probe has "
                "fit(features, labels) and predict(features)"
            )
    return part.where, made


@contextmanager
def _same_on_all_ranks(task: ProbeTask) -> Iterator[None]:
    """Seeds every global generator: ranks fit the same rows, and must end with the same probe."""
    seed = stream(task.config.seed, "probe")
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with seeded(seed, task.runtime.device):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _fit(task: ProbeTask) -> ProbeOutcome:
    """Fits the object on the features of all training images, the same on every rank."""
    options = task.config.probe.options_of(task.kind)
    train = task.rows.gathered("train", task.input)
    assert train is not None
    in_dim = train[0][0].numel()
    with _same_on_all_ranks(task):
        where, made = _make(task.kind, options)
        with torch.enable_grad():
            run(where, made.fit, train[0].detach().cpu(), train[1].detach().cpu())
    head = OwnHead(where, made, len(task.classes))
    description = task.describe(in_dim, {"name": task.kind, "options": dict(options)}, classes=task.classes)
    fitted = FittedProbe(description, head=head).to(task.runtime.device)
    return ProbeOutcome(fitted.eval(), dict(options), facts={"iterations": None})


OWN = ProbeSpec(_check, _fit, OwnHead)
"""Of every probe of a user's own."""
