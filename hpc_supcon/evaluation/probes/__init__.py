"""Probes by name: classifiers of an encoder's features, or of pixels, whose accuracy measures the encoder."""

from __future__ import annotations

from ...config import Config
from ...data import Splits
from .base import FittedProbe, ProbeOutcome, ProbeSpec, ProbeTask
from .finetune import FINETUNE
from .heads import LINEAR, MLP, SOFTMAX
from .knn import KNN
from .logistic import LOGISTIC

__all__ = [
    "PROBES",
    "FittedProbe",
    "ProbeOutcome",
    "ProbeSpec",
    "ProbeTask",
    "check_probes",
    "needs_encoder",
    "probe_input",
]

PROBES: dict[str, ProbeSpec] = {
    "linear": LINEAR,
    "softmax": SOFTMAX,
    "logistic": LOGISTIC,
    "mlp": MLP,
    "knn": KNN,
    "finetune": FINETUNE,
}
"""`probe.kind` -> the probe."""


def probe_input(config: Config, kind: str) -> str:
    """What the probe `kind` reads under this configuration: `features`, `pixels` or `images`."""
    return PROBES[kind].input_of(getattr(config.probe, kind))


def needs_encoder(config: Config) -> bool:
    """Whether any probe of `probe.kind` reads more than pixels."""
    return any(probe_input(config, kind) != "pixels" for kind in config.probe.kinds)


def check_probes(config: Config, splits: Splits) -> None:
    """Raise ConfigError where these data do not allow a probe of `probe.kind`. Cheap: meant for before training."""
    for kind in config.probe.kinds:
        PROBES[kind].check(f"probe.{kind}", getattr(config.probe, kind), splits)
