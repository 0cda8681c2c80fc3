"""What can be known to be wrong with section `probe` before anything is trained."""

from __future__ import annotations

from typing import Any

from ..config import Config
from ..data import Splits
from ..data.order import check_ranks_divide
from ..distributed.collectives import world_size
from ..errors import ConfigError, unknown_name
from .probes import PROBES
from .probes.base import input_of, only_count, pair_of
from .probes.watch import steps_per_epoch


def needs_encoder(config: Config) -> bool:
    """Whether any of `probe.kind` reads more than pixels. Raises ConfigError for an unknown kind."""
    kinds = config.probe.kinds
    if not kinds:
        raise ConfigError(f"probe.kind is an empty list: name one or more of {', '.join(PROBES)}")
    for kind in kinds:
        if kind not in PROBES:
            raise ConfigError("probe.kind: " + unknown_name("probe", kind, PROBES))
    return any(input_of(kind, getattr(config.probe, kind)) != "pixels" for kind in kinds)


def check_probe(config: Config, splits: Splits) -> None:
    """Raise ConfigError where a probe cannot be fitted or its choices not made. Cheap: meant for before training."""
    needs_encoder(config)
    kinds = config.probe.kinds
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f"probe.kind names a probe twice: {', '.join(kinds)}")
    for kind in kinds:
        settings: Any = getattr(config.probe, kind)
        if kind == "knn":
            if settings.k > len(splits.train):
                raise ConfigError(
                    f"probe.knn.k={settings.k} neighbors, but the training split has {len(splits.train)} images"
                )
            continue
        _check_choices(kind, settings, splits)
        _check_length(kind, settings, splits)


def _check_choices(kind: str, settings: Any, splits: Splits) -> None:
    stopping = settings.stopping
    if stopping.target is not None and stopping.monitor == "accuracy" and not 0 <= stopping.target <= 1:
        raise ConfigError(f"probe.{kind}.stopping.target={stopping.target:g}: an accuracy is a fraction, 0 to 1")
    if kind == "logistic":
        pair = pair_of(settings.classes, splits.classes)
        if splits.validation is not None and not only_count(splits.validation.labels, pair):
            raise ConfigError("probe.logistic.classes: the validation split has no image of either class")
    if splits.validation is not None:
        return
    if kind == "linear" and len(settings.lrs) > 1:
        raise ConfigError(
            f"probe.linear.lrs has {len(settings.lrs)} learning rates but there is no validation split to choose on: "
            "give one rate, or set data.validation_fraction"
        )
    for name in ("patience", "target"):
        if getattr(stopping, name) is not None:
            raise ConfigError(
                f"probe.{kind}.stopping.{name}={getattr(stopping, name):g} but there is no validation split: "
                "make it null, or set data.validation_fraction"
            )


def _check_length(kind: str, settings: Any, splits: Splits) -> None:
    n = len(splits.train)
    if kind == "logistic":
        n = only_count(splits.train.labels, pair_of(settings.classes, splits.classes))
        if n == 0:
            raise ConfigError("probe.logistic.classes: the training split has no image of either class")
    if kind == "finetune":
        if settings.batch_size > n:
            raise ConfigError(
                f"probe.finetune.batch_size={settings.batch_size} but the training split has {n} images: lower it"
            )
        try:
            check_ranks_divide(settings.batch_size, 0, world_size())
        except ConfigError as error:
            raise ConfigError(str(error).replace("data.batch_size", "probe.finetune.batch_size")) from None
    if kind == "mlp" and settings.batch_norm and min(settings.batch_size, n) < 2:
        raise ConfigError("probe.mlp.batch_norm needs at least two images per step; raise probe.mlp.batch_size")
    epoch = n // settings.batch_size if kind == "finetune" else steps_per_epoch(n, settings.batch_size)
    total = settings.iterations or settings.epochs * epoch
    if settings.evaluate_every is not None and settings.evaluate_every > total:
        raise ConfigError(
            f"probe.{kind}.evaluate_every={settings.evaluate_every} but training has only {total} iterations: "
            "the validation split would be looked at but once; lower it, or raise iterations"
        )
