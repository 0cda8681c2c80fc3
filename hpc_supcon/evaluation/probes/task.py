"""What a probe is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...config import Config
from ...runtime import Runtime
from ...training import assemble
from ..inputs import Inputs
from ..saved import FittedProbe


@dataclass(frozen=True)
class Task:
    """A run's data, its encoder where it has one, and where the rows of features and pixels come from."""

    config: Config
    runtime: Runtime
    data: assemble.Data
    inputs: Inputs
    description: Mapping[str, Any]
    """As `assemble.describe_model`; a run without an encoder has only `classes` and `normalisation`."""
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
