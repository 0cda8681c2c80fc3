"""The probe `logistic`: binary logistic regression of two of the classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...data import Splits
from ...errors import ConfigError, unknown_name
from ...models import Logistic, SingleHead
from ..features import rows_of_classes
from .base import ProbeOutcome, ProbeSpec, ProbeTask
from .heads import fit_head
from .optimization import check_fit, steps_per_epoch


def _check(section: str, settings: Any, splits: Splits) -> None:
    pair = class_pair(section, settings.classes, splits.classes)
    for split, source in (("training", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if source is not None and not rows_of_classes(source.labels, pair).any():
            raise ConfigError(f"{section}.classes: the {split} split has no image of either class")
    n = int(rows_of_classes(splits.train.labels, pair).sum())
    check_fit(section, settings, splits, steps_per_epoch(n, settings.batch_size))


def _fit(task: ProbeTask) -> ProbeOutcome:
    pair = class_pair(f"probe.{task.kind}", task.settings.classes, task.classes)
    outcome = fit_head(
        task,
        {"name": "logistic", "options": {}},
        lambda in_dim, classes: SingleHead(_head(in_dim, classes)),
        labels=pair,
    )
    return replace(outcome, chosen={**outcome.chosen, "classes": list(outcome.probe.classes)})


def class_pair(section: str, wanted: tuple[str | int, str | int] | None, classes: tuple[str, ...]) -> tuple[int, int]:
    """The two labels that the setting `section`.classes means. Raises ConfigError."""
    if wanted is None:
        if len(classes) != 2:
            shown = ", ".join(classes[:20]) + (" ..." if len(classes) > 20 else "")
            raise ConfigError(f"{section}.classes: choose two of the {len(classes)} classes: {shown}")
        return 0, 1
    first, second = (_label(section, name, classes) for name in wanted)
    if first == second:
        raise ConfigError(f"{section}.classes: {wanted[0]!r} and {wanted[1]!r} are the same class")
    return first, second


def _label(section: str, name: str | int, classes: tuple[str, ...]) -> int:
    if isinstance(name, int):
        if not 0 <= name < len(classes):
            raise ConfigError(f"{section}.classes: no class has index {name}; there are 0 to {len(classes) - 1}")
        return name
    if name not in classes:
        raise ConfigError(f"{section}.classes: " + unknown_name("class", name, classes))
    return classes.index(name)


def _head(in_dim: int, classes: int) -> Logistic:
    assert classes == 2
    return Logistic(in_dim)


LOGISTIC = ProbeSpec(_check, _fit, _head)
