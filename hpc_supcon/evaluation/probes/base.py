"""What every probe shares: its task, its outcome, and which rows and classes it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...config import Config
from ...distributed.launch import Runtime
from ...errors import ConfigError, unknown_name
from ...training.data import Data
from ..features import Inputs, Part
from ..fitted_probe import FittedProbe


@dataclass(frozen=True)
class Task:
    """A run's data, its encoder where it has one, and where the rows of features and pixels come from."""

    config: Config
    runtime: Runtime
    data: Data
    inputs: Inputs
    description: Mapping[str, Any]
    """As `build.describe_model`; a run without an encoder has only `classes` and `normalization`."""
    encoder: nn.Module | None
    masks: Mapping[str, Tensor] | None = None
    """Of a pruned encoder, packed (see pruning.WeightMasks): who trains the encoder keeps it pruned."""

    @property
    def classes(self) -> tuple[str, ...]:
        return self.data.splits.classes


@dataclass(frozen=True)
class Outcome:
    """A fitted probe; `chosen` and the numbers of `facts` go into results.json."""

    probe: FittedProbe
    chosen: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry for each evaluation while training; empty where nothing is trained."""
    facts: dict[str, Any] = field(default_factory=dict)


_ON_PIXELS = ("softmax", "logistic")


def input_of(kind: str, settings: Any) -> str:
    """`features`, `pixels` or (finetune) `images`: what the probe `kind` reads."""
    if kind == "finetune":
        return "images"
    if settings.input == "auto":
        return "pixels" if kind in _ON_PIXELS else "features"
    return str(settings.input)


def pair_of(wanted: tuple[str | int, str | int] | None, classes: tuple[str, ...]) -> tuple[int, int]:
    """The two labels that `probe.logistic.classes` means. Raises ConfigError."""
    if wanted is None:
        if len(classes) != 2:
            shown = ", ".join(classes[:20]) + (" ..." if len(classes) > 20 else "")
            raise ConfigError(f"probe.logistic.classes: choose two of the {len(classes)} classes: {shown}")
        return 0, 1
    first, second = (_label(name, classes) for name in wanted)
    if first == second:
        raise ConfigError(f"probe.logistic.classes: {wanted[0]!r} and {wanted[1]!r} are the same class")
    return first, second


def _label(name: str | int, classes: tuple[str, ...]) -> int:
    if isinstance(name, int):
        if not 0 <= name < len(classes):
            raise ConfigError(f"probe.logistic.classes: no class has index {name}; there are 0 to {len(classes) - 1}")
        return name
    if name not in classes:
        raise ConfigError("probe.logistic.classes: " + unknown_name("class", name, classes))
    return classes.index(name)


def only(part: Part, pair: tuple[int, int]) -> Part:
    """The rows of these two labels, which become 0 and 1."""
    x, labels = part
    rows = torch.isin(labels, labels.new_tensor(pair))
    return x[rows], (labels[rows] == pair[1]).long()


def only_count(labels: Tensor, pair: tuple[int, int]) -> int:
    """How many of `labels` are one of the two."""
    return int(torch.isin(labels, labels.new_tensor(pair)).sum())
