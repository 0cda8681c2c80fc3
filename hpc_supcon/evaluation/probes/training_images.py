"""Batches of training images, for the probes that see new random views of them in every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ...data import Batch, EvalTransform, Loader, LoaderOptions, Splits, TrainOrder, build_loader
from ...distributed.collectives import gather_rows
from ...errors import ConfigError
from ...seeding import stream
from ...training.build import build_views
from ...training.engine import autocast, unscaled
from ..features import LabeledRows
from .base import ProbeTask
from .optimization import check_fit


def check_batches(section: str, settings: Any, splits: Splits) -> None:
    """Raise ConfigError where the training split is smaller than a batch, or `check_fit` does."""
    n, batch_size = len(splits.train), settings.batch_size
    if batch_size > n:
        raise ConfigError(f"{section}.batch_size={batch_size} but the training split has {n} images: lower it")
    check_fit(section, settings, splits, n // batch_size)


def open_loader(task: ProbeTask, *, augment: bool) -> Loader:
    """This rank's loader of the training split, without the last incomplete batch. Raises what the loader raises."""
    data, settings, runtime = task.data, task.settings, task.runtime
    return build_loader(
        data.loader,
        data.splits.train,
        TrainOrder(len(data.splits.train), settings.batch_size),
        seed=task.config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
        # not data.evaluation, which leaves images out: batches of training have one size
        options=_one_view(data.training) if augment else replace(data.training, crop=None),
    )


def _one_view(options: LoaderOptions) -> LoaderOptions:
    return options if options.crop is None else replace(options, crop=replace(options.crop, views=1))


def preprocessing(task: ProbeTask, *, augment: bool) -> Callable[[Tensor], Tensor]:
    """uint8 images of a batch -> one normalized view of each: augmented, or the image itself."""
    config = task.config
    if not augment:
        return EvalTransform(**task.description["normalization"]).to(task.runtime.device)
    update = {"data": config.data.model_copy(update={"views": 1}), "augment": config.augment.of_one_view()}
    one = config.model_copy(update=update)
    seed = stream(one.seed, "finetune views", task.runtime.rank)
    views = build_views(one, dict(task.description), seed=seed).to(task.runtime.device)
    return lambda images: views(images).flatten(0, 1)


def endless(loader: Loader) -> Iterator[Batch]:
    """The batches of one epoch after the other."""
    for epoch in count():
        yield from loader.epoch(epoch)


def features_of_views(task: ProbeTask, loader: Loader) -> Iterator[LabeledRows]:
    """Features of new random views, batch by batch without end: the global batch on every rank. Collective.

    The encoder is frozen, in eval mode, and computes in the precision of training.
    """
    assert task.encoder is not None
    encoder, preprocess = task.encoder.eval(), preprocessing(task, augment=True)
    precision = partial(autocast, task.runtime.device, unscaled(task.config.train.precision))
    for batch in endless(loader):
        with torch.no_grad(), precision():
            features = encoder(preprocess(batch.images)).float()
        yield gather_rows(features), gather_rows(batch.labels)
