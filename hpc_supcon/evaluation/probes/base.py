"""What a probe is: its entry in the registry, the task it is given, and the fitted classifier it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...config import Config
from ...data import Splits
from ...distributed.launch import Runtime
from ...parts import file_name
from ...training.data import Data
from ..features import SplitRows, build_prepare, in_chunks


@dataclass(frozen=True)
class ProbeSpec:
    """One kind of probe: an entry of PROBES. Its settings are the section `probe.KIND` of the configuration,
    which also says what it reads."""

    check: Callable[[str, Any, Splits], None]
    """check(section, settings, splits) raises ConfigError, naming `section` (probe.KIND), where these data do not
    allow these settings. What the configuration alone decides is checked when it is loaded."""
    fit: Callable[[ProbeTask], ProbeOutcome]
    """Collective: all ranks call it and end with the same probe."""
    head: Callable[..., nn.Module]
    """head(in_dim, classes, **options) -> a classifier [n, in_dim] -> logits [n, classes], not fitted yet; options:
    `description["head"]["options"]` of a fitted probe."""
    training_logits: Callable[[FittedProbe, Tensor, Tensor], Tensor] | None = None
    """training_logits(probe, x, rows) -> logits of `x`, which are rows number `rows` int64 [n] of training;
    None: as of other rows."""


@dataclass(frozen=True)
class ProbeTask:
    """One probe to fit: its kind, the run's data, and the run's encoder where there is one."""

    kind: str
    input: str
    """`features`, `pixels` or `images`."""
    config: Config
    runtime: Runtime
    data: Data
    rows: SplitRows
    description: Mapping[str, Any]
    """As `build.describe_model`; a run without an encoder has only `classes` and `normalization`."""
    encoder: nn.Module | None
    masks: Mapping[str, Tensor] | None = None
    """Packed masks of a pruned encoder (see pruning.WeightMasks): a probe that trains the encoder keeps it pruned."""
    other_data: str = ""
    """The name of other data than the run's own; see transfer.data_name."""

    @property
    def name(self) -> str:
        """By which the results are filed."""
        kind = file_name(self.kind)
        return f"{kind}@{self.other_data}" if self.other_data else kind

    @property
    def settings(self) -> Any:
        """The section `probe.KIND` of the configuration."""
        return getattr(self.config.probe, self.kind)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the data's classes, in the order of the labels."""
        return self.data.splits.classes

    def describe(
        self,
        in_dim: int,
        head: dict[str, Any],
        *,
        classes: Sequence[str],
        standardize: bool = False,
        encoder: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The description of this task's FittedProbe. head: its name and the options of ProbeSpec.head."""
        return {
            "kind": self.kind,
            "input": self.input,
            "classes": list(classes),
            "normalization": self.description["normalization"],
            "standardize": standardize,
            "in_dim": in_dim,
            "encoder": encoder,
            "head": head,
        }


class FittedProbe(nn.Module):
    """Raw input -> [preparation, encoder if it trained one, head] -> logits.

    `description` is plain data from which the module is built again (see fitted_probe.build_probe): kind, input
    ("features": float [n, D] of the run's encoder; "pixels" and "images": uint8 [n, C, H, W]), classes,
    normalization, standardize, in_dim, encoder (null unless it trained one), head.
    """

    def __init__(self, description: dict[str, Any], *, head: nn.Module, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.description = description
        self.prepare = build_prepare(
            description["input"],
            description["in_dim"],
            description["normalization"],
            standardize=description["standardize"],
        )
        self.encoder = encoder if encoder is not None else nn.Identity()
        self.head = head

    @property
    def kind(self) -> str:
        return self.description["kind"]

    @property
    def input(self) -> str:
        return self.description["input"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(self.description["classes"])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.prepare(x)))

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """float [n, classes] of raw input (see the class); their softmax is the probabilities (kNN: each class's
        share of the votes). Puts the module into eval mode."""
        self.eval()
        return in_chunks(self, x)

    @property
    def head_parameters(self) -> int:
        """How many numbers the head has learned."""
        return sum(p.numel() for p in self.head.parameters())


@dataclass(frozen=True)
class ProbeOutcome:
    """A fitted probe; `chosen` and the entries of `facts` go into results.json."""

    probe: FittedProbe
    chosen: dict[str, Any]
    """Settings and iteration that the validation split chose."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry for each evaluation during training; empty where nothing is trained."""
    facts: dict[str, Any] = field(default_factory=dict)
