"""Probes by name: classifiers of an encoder's features, or of pixels, whose accuracy measures the encoder."""

from __future__ import annotations

from functools import partial

import torch

from ...config import Config
from ...data import Splits, bits_of, check_depth, is_picture, pixel_dtype
from ...errors import ConfigError, unknown_name
from ...parts import find
from ...training.data import open_ood
from ..transfer import check_transfer, without_transfer
from .base import FittedProbe, ProbeOutcome, ProbeSpec, ProbeTask
from .finetune import FINETUNE
from .heads import LINEAR, MLP, SOFTMAX
from .knn import KNN
from .logistic import LOGISTIC
from .own_probe import OWN

__all__ = [
    "PROBES",
    "FittedProbe",
    "ProbeOutcome",
    "ProbeSpec",
    "ProbeTask",
    "check_probes",
    "probe_spec",
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


def probe_spec(kind: str) -> ProbeSpec:
    """The entry of PROBES, or that of a probe of a user's own, which is imported. Raises ConfigError,
    CodeNotAllowed."""
    if find("probes", kind, PROBES) is not None:
        return OWN
    if kind not in PROBES:
        raise ConfigError(unknown_name("probe.kind", kind, PROBES))
    return PROBES[kind]


def check_probes(config: Config, splits: Splits) -> None:
    """Raise ConfigError or DataError where these data do not allow a probe of `probe.kind`.

    Cheap: meant for before training. Images without labels have no probes but those of `probe.transfer`.
    """
    if config.probe.transfer_sets:
        check_transfer(config, splits.image_size, splits.channels, partial(_check_other, pixel_dtype(splits.train)))
        config = without_transfer(config)
    if not splits.has_labels:
        return
    if config.probe.corruption_names and not is_picture(splits.channels, pixel_dtype(splits.train)):
        raise ConfigError(
            f"probe.corruptions are for 8-bit images of 1 or 3 channels, but these have {splits.channels} of "
            f"{bits_of(pixel_dtype(splits.train))} bits: use probe.corruptions=[]"
        )
    images = config.probe.corruption_images if config.probe.corruption_names else None
    if images is not None and images > len(splits.labeled_test):
        raise ConfigError(
            f"probe.corruption_images={images} but the test split has {len(splits.labeled_test)} images: lower it, "
            "or null for all"
        )
    for kind in config.probe.kinds:
        splits.check_two_classes(f"probe.kind={kind}")
        is_own = kind in config.probe.own
        settings = config.probe.options_of(kind) if is_own else getattr(config.probe, kind)
        probe_spec(kind).check(f"probe.{kind}", settings, splits)
    open_ood(config, splits)  # so that one that is missing is told before training


def _check_other(dtype: torch.dtype, config: Config, splits: Splits) -> None:
    """`check_probes` of other data, whose levels must be those of the run's own."""
    check_depth(pixel_dtype(splits.train), dtype)
    check_probes(config, splits)
