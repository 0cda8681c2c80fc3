"""Rules of data.labels=none: what needs labels is refused before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from ..errors import ConfigError
from .check_data import OWN_SOURCES
from .schema import Config, names

UNSUPERVISED = frozenset({"simclr", *get_args(names.OfViewsName), *get_args(names.DecoderLossName)})
"""Losses that use no labels, whatever loss.supervised says."""
CLASSIFYING = frozenset(get_args(names.ClassifierLossName))


def check_labels(config: Config, stages: Sequence[str]) -> None:
    """Raise ConfigError where a stage needs labels that the images do not have."""
    data = config.data
    if data.labels == "folders":
        return
    if data.source in get_args(names.SourceName) and data.source not in OWN_SOURCES:
        raise ConfigError(
            f"data.labels=none is for data.source={', '.join(get_args(names.OwnSourceName))}; {data.source} has "
            "labels, which loss.supervised=false or loss.name=simclr do not use"
        )
    if "pretrain" in stages:
        _check_training(config)
    if "prune" in stages:
        raise ConfigError("data.labels=none: prune compares probes of the run's own images, which have no labels")
    if "probe" in stages:
        _check_evaluation(config)


def _check_training(config: Config) -> None:
    loss, has_no = config.loss, "data.labels=none: the images have no labels"
    terms = loss.weights.keys() - UNSUPERVISED
    if classifiers := sorted(terms & CLASSIFYING):
        raise ConfigError(f"{has_no}, which loss {', '.join(classifiers)} learns: use loss.name=simclr")
    if loss.supervised and terms:
        raise ConfigError(
            f"{has_no}, which loss {', '.join(sorted(terms))} tells apart: use loss.supervised=false (the positives "
            "of an image are its views), loss.name=simclr or reconstruction"
        )
    if config.data.sampler != "random":
        raise ConfigError(f"{has_no}, which data.sampler={config.data.sampler} draws by: use data.sampler=random")
    if config.log.gradient_response:
        raise ConfigError(
            f"{has_no}, by which log.gradient_response counts positives: use log.gradient_response=false"
        )
    if config.validation.probe.kind != "none":
        raise ConfigError(
            f"{has_no}, on which validation.probe.kind={config.validation.probe.kind} is fitted: use none; the loss "
            "is validated without labels"
        )
    if config.train.stopping.enabled and config.train.stopping.monitor == "accuracy":
        raise ConfigError(f"{has_no} and so no accuracy: use train.stopping.monitor=loss")


def _check_evaluation(config: Config) -> None:
    """Probes of the run's own images are skipped, or are of probe.transfer; what is asked for by name is refused."""
    probe = config.probe
    for setting in ("corruptions", "ood"):
        if getattr(probe, setting):
            raise ConfigError(
                f"data.labels=none: probe.{setting} needs probes of the run's own images, which have no labels: use "
                f"probe.{setting}=[]"
            )
    if not probe.needs_encoder:
        raise ConfigError(
            f"data.labels=none: probe.kind={', '.join(probe.kinds)} reads pixels of the run's own images, which have "
            "no labels: choose a probe of features, such as probe.kind=linear"
        )
