"""Rules between the settings of what follows training: probes and pruning."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

from ..errors import ConfigError, unknown_name
from .check_data import OWN_SOURCES
from .schema import Config
from .schema.names import (
    ClassifierLossName,
    ContrastiveName,
    FisherPruningName,
    ProbeName,
    SourceName,
    WeightPruningName,
)
from .schema.pruning import PruneConfig

WITHOUT_FILES = ("digits", "synthetic")
"""Sources that need no folder."""


def has_no_validation(config: Config) -> bool:
    """Only a user's own images, or the .beton files made of them, and a source that is a user's own code may have a
    validation split of their own."""
    may_have = config.data.source in OWN_SOURCES or config.data.source not in get_args(SourceName)
    return config.data.validation_fraction == 0 and not may_have


def check_target(section: str, monitor: str, target: float | None) -> None:
    if monitor == "accuracy" and target is not None and not 0 <= target <= 1:
        raise ConfigError(f"{section}.stopping.target={target:g}: an accuracy is a fraction, 0 to 1")


def check_probes(config: Config) -> None:
    """Whether there are enough images, and the classes of logistic regression, is known once the data is loaded."""
    kinds = config.probe.kinds
    if not kinds:
        raise ConfigError(f"probe.kind is an empty list: name one or more of {', '.join(get_args(ProbeName))}")
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f"probe.kind names a probe twice: {', '.join(kinds)}")
    names = config.probe.corruption_names
    if len(set(names)) < len(names):
        raise ConfigError(f"probe.corruptions names a corruption twice: {', '.join(names)}")
    for kind in kinds:
        if kind != "knn" and kind not in config.probe.own:
            _check_fit(config, kind, getattr(config.probe, kind))
    _check_sets(config, "probe.ood", config.probe.ood_sets, "compares features of an encoder")
    _check_sets(config, "probe.transfer", config.probe.transfer_sets, "measures an encoder on other data")


def _check_sets(config: Config, setting: str, sets: list[tuple[str, str, str | None]], what: str) -> None:
    """Whether the files are there, and can be converted, is known once they are opened."""
    probe, data = config.probe, config.data
    if sets and not probe.needs_encoder:
        raise ConfigError(
            f"{setting} {what}, but probe.kind={', '.join(probe.kinds)} reads pixels: use "
            f"{setting}=[], or add a probe of features such as linear"
        )
    for text, source, path in sets:
        if source not in get_args(SourceName):
            raise ConfigError(unknown_name(setting, source, get_args(SourceName)))
        if path == "" or (source in OWN_SOURCES and path is None):
            raise ConfigError(f"{setting}={text}: name its folder as {source}:PATH")
        is_transfer = setting == "probe.transfer"
        # a folder whose labels the run did not use may be read with them; of other sources there is only one
        is_own = path in (None, data.root) and not (is_transfer and data.labels == "none")
        if source == data.source and (
            is_own or source in WITHOUT_FILES or (is_transfer and source not in OWN_SOURCES)
        ):
            raise ConfigError(f"{setting}={text}: that is the run's own data; name another data set")
    names = [text if source in OWN_SOURCES else source for text, source, _ in sets]
    if len(set(names)) < len(names):
        raise ConfigError(f"{setting} names a data set twice: {', '.join(names)}")


def _check_fit(config: Config, kind: str, settings: Any) -> None:
    stopping, every = settings.stopping, settings.evaluate_every
    check_target(f"probe.{kind}", stopping.monitor, stopping.target)
    if every is not None and settings.iterations is not None and every > settings.iterations:
        raise ConfigError(
            f"probe.{kind}.evaluate_every={every} but training has only {settings.iterations} iterations: the "
            f"validation split would be evaluated only once; lower it, or raise probe.{kind}.iterations"
        )
    if kind != "finetune" and settings.input == "images" and settings.standardize:
        raise ConfigError(
            f"probe.{kind}.standardize takes mean and variance of features that are computed once, which "
            f"probe.{kind}.input=images does not: set probe.{kind}.standardize=false"
        )
    if kind == "mlp" and settings.batch_norm and settings.batch_size < 2:
        raise ConfigError("probe.mlp.batch_norm needs at least two images per step; raise probe.mlp.batch_size")
    if kind == "logistic" and settings.classes is not None and len(set(settings.classes)) < 2:
        raise ConfigError(f"probe.logistic.classes: twice the same class, {settings.classes[0]!r}; name two")
    if has_no_validation(config):
        _check_choices(kind, settings)


def _check_choices(kind: str, settings: Any) -> None:
    """What a probe chooses on a validation split, of which there is none."""
    if kind == "linear" and len(settings.lrs) > 1:
        raise ConfigError(
            f"probe.linear.lrs has {len(settings.lrs)} learning rates but there is no validation split to choose on: "
            "give one rate, or set data.validation_fraction"
        )
    for name in ("patience", "target"):
        value = getattr(settings.stopping, name)
        if value is not None:
            raise ConfigError(
                f"probe.{kind}.stopping.{name}={value:g} but there is no validation split: make it null, or set "
                "data.validation_fraction"
            )


def check_report(config: Config) -> None:
    """Of the maps; whether an image folder has a validation split is known once it is loaded."""
    report = config.report
    for name in ("spaces", "methods"):
        values = getattr(report, name)
        if len(set(values)) < len(values):
            raise ConfigError(f"report.{name} names one twice: {', '.join(values)}")
    if report.perplexity == ():
        raise ConfigError("report.perplexity is an empty list: give one or more numbers of neighbors")
    if report.split == "validation" and has_no_validation(config):
        raise ConfigError(
            "report.split=validation but there is no validation split: choose test, or set data.validation_fraction"
        )


def check_pruning(config: Config) -> None:
    """Whether fine-tuning is long enough, and what the layers allow, is known once data and encoder are loaded."""
    prune = config.prune
    if not config.probe.needs_encoder:
        raise ConfigError(
            f"probe.kind={', '.join(config.probe.kinds)} reads pixels, which pruning does not change: choose "
            "probes of features, such as probe.kind=linear"
        )
    rates = [f"{rate:g}" for rate in prune.rates]  # as they are written in the names of folders
    if len(set(rates)) < len(rates):
        raise ConfigError(f"prune.rate names a rate twice: {', '.join(rates)}")
    if prune.method == "channels":
        _check_channels(prune)
    if prune.pattern is not None:
        _check_pattern(prune)
    if prune.method == "layer_sensitive":
        _check_scan(config)
    if prune.method in get_args(FisherPruningName) and prune.loss == "run":
        _check_likelihood(config)
    if prune.fits_classifier:
        _check_fit(config, "linear", config.probe.linear)
    _check_schedule(prune)


def _check_channels(prune: PruneConfig) -> None:
    if prune.pattern is not None:
        raise ConfigError(
            f"prune.scope={prune.scope} keeps N of every M weights, but prune.method=channels removes whole "
            "channels: use prune.scope=global or layer"
        )
    if prune.schedule == "gradual":
        raise ConfigError(
            "prune.schedule=gradual prunes weights while they are trained, but prune.method=channels changes their "
            "shapes: use prune.schedule=iterative"
        )
    if prune.schedule == "iterative" and prune.rewind is not None:
        raise ConfigError(
            f"prune.rewind={prune.rewind}: with prune.schedule=iterative, prune.method=channels prunes weights of "
            "the round before, which the run's checkpoints do not have: use prune.schedule=oneshot"
        )


def _check_likelihood(config: Config) -> None:
    names = list(config.loss.weights)
    known = (*get_args(ContrastiveName), *get_args(ClassifierLossName))
    if len(names) > 1 or names[0] not in known:
        raise ConfigError(
            f"prune.method={config.prune.method} needs a likelihood, which the loss {config.loss.label} is not: set "
            "prune.loss=cross_entropy, of a linear probe"
        )


def _check_pattern(prune: PruneConfig) -> None:
    if len(prune.rates) > 1:
        raise ConfigError(
            f"prune.scope={prune.scope} has a rate of its own, 1 - N/M, but prune.rate is a list: drop prune.rate"
        )
    if prune.method == "layer_sensitive":
        raise ConfigError(
            f"prune.scope={prune.scope} gives every layer one rate, which prune.method=layer_sensitive chooses by "
            "layer: use another method"
        )
    if prune.schedule != "oneshot":
        raise ConfigError(
            f"prune.scope={prune.scope} has one rate, to which prune.schedule={prune.schedule} cannot grow: use "
            "prune.schedule=oneshot"
        )


def _check_scan(config: Config) -> None:
    prune = config.prune
    if prune.scope != "global":
        raise ConfigError(
            "prune.scope=layer gives every layer one rate, which prune.method=layer_sensitive chooses by layer: use "
            "prune.scope=global"
        )
    if has_no_validation(config):
        raise ConfigError(
            "prune.method=layer_sensitive scans the loss on the validation split: set data.validation_fraction"
        )
    rates = [f"{rate:g}" for rate in prune.scan.rates]
    if len(set(rates)) < len(rates):
        raise ConfigError(f"prune.scan.rates names a rate twice: {', '.join(rates)}")
    if max(prune.rates) > max(prune.scan.rates):
        raise ConfigError(
            f"prune.rate={max(prune.rates):g} is above the largest of prune.scan.rates, {max(prune.scan.rates):g}, "
            "at which a layer is scanned: add a larger one"
        )


def _check_schedule(prune: PruneConfig) -> None:
    if prune.schedule == "iterative" and any(b <= a for a, b in pairwise(prune.rounds)):
        raise ConfigError(
            f"prune.schedule=iterative prunes more in every round, but prune.rate gives the rounds "
            f"{', '.join(f'{rate:g}' for rate in prune.rounds)}: give increasing rates, or fewer prune.steps"
        )
    if prune.schedule != "gradual" and prune.interval is not None:
        raise ConfigError(f"prune.interval={prune.interval} is for prune.schedule=gradual alone; use null")
    if prune.schedule == "gradual":
        _check_gradual(prune)
    if prune.rewind is not None and not prune.finetunes:
        raise ConfigError(
            f"prune.rewind={prune.rewind} takes the weights back to be trained again: set prune.finetune.epochs"
        )
    if prune.rewind is not None and prune.schedule == "iterative" and not prune.finetune.between:
        raise ConfigError(
            f"prune.rewind={prune.rewind}: without prune.finetune.between, the next round would prune the weights as "
            "they were, not as they were trained; set prune.finetune.between=true"
        )


def _check_gradual(prune: PruneConfig) -> None:
    if not prune.finetunes:
        raise ConfigError(
            "prune.schedule=gradual prunes while it fine-tunes: set prune.finetune.epochs or iterations"
        )
    if prune.method not in get_args(WeightPruningName):
        raise ConfigError(
            f"prune.schedule=gradual scores weights during training, for which prune.method={prune.method} needs "
            "other data: use prune.schedule=iterative"
        )
    if prune.rewind is not None:
        raise ConfigError(
            f"prune.rewind={prune.rewind}: prune.schedule=gradual prunes weights as they are trained; use iterative"
        )
    length = prune.finetune.iterations
    if length is not None and prune.steps * (prune.interval or 1) > length:
        raise ConfigError(
            f"prune.steps={prune.steps} prunings, one every {prune.interval or 1} steps, end after "
            f"prune.finetune.iterations={length}: the rate would not be reached; lower prune.steps or prune.interval"
        )
