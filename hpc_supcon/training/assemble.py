"""From the configuration to objects: the one place where settings become keyword arguments."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ..config import Config
from ..data import ArraySource, Source, Splits, TrainOrder, Views, channel_statistics, load_splits
from ..errors import ConfigError, DataError, unknown_name
from ..losses import LOSSES
from ..models import ContrastiveModel, Projection, build_encoder
from ..runtime import Runtime
from .engine import autocast, distribute, place
from .fit import Plan
from .optim import build_optimiser, learning_rate
from .state import TrainState


def load_data(config: Config) -> Splits:
    """The data set, every image decoded: damage is met before training, not after it."""
    data = config.data
    splits = load_splits(
        data.source,
        root=data.root,
        download=data.download,
        image_size=data.image_size,
        channels=data.channels,
        validation_fraction=data.validation_fraction,
        seed=config.seed,
        synthetic=data.synthetic.model_dump() if data.source == "synthetic" else None,
    )
    validation = None if splits.validation is None else _decoded(splits.validation)
    return Splits(_decoded(splits.train), validation, _decoded(splits.test))


def _decoded(source: Source) -> ArraySource:
    return source if isinstance(source, ArraySource) else ArraySource(source.stack(), source.labels, source.classes)


def check_batches(config: Config, order: TrainOrder, splits: Splits) -> None:
    """Raise DataError when a batch of the first epoch has no two images to pull together."""
    if config.data.views > 1:
        return
    labels = splits.train.labels[order.epoch(config.seed, 0, 0, 1)].sort(dim=1).values
    alone = (labels[:, 1:] != labels[:, :-1]).all(dim=1)
    if alone.any():
        raise DataError(
            f"data.views=1 and no class repeats within batch {int(alone.nonzero()[0])} of "
            f"data.batch_size={config.data.batch_size}: nothing would be pulled together; use data.views=2 or a "
            "larger batch"
        )


def describe_model(config: Config, splits: Splits) -> dict[str, Any]:
    """What a checkpoint must say for its model to be built again without the data set."""
    model = config.model
    return {
        "encoder": {
            "name": model.encoder,
            "in_channels": splits.channels,
            "image_size": splits.image_size,
            "stem": model.stem,
            "out_dim": model.out_dim,
        },
        "projection": {"hidden": model.projection_hidden, "out_dim": model.projection_dim},
        "classes": list(splits.classes),
    }


def build_model(description: dict[str, Any]) -> ContrastiveModel:
    """The model of `describe_model`, freshly initialised from the global generator. Raises ConfigError."""
    encoder = build_encoder(**description["encoder"])
    return ContrastiveModel(encoder, Projection(cast(int, encoder.feature_dim), **description["projection"]))


def build_loss(config: Config) -> nn.Module:
    loss = config.loss
    if loss.name not in LOSSES:
        raise ConfigError("loss.name: " + unknown_name("loss", loss.name, LOSSES))
    return LOSSES[loss.name](
        temperature=loss.temperature, base_temperature=loss.base_temperature, backend=loss.backend, validate=False
    )


def build_views(config: Config, splits: Splits, normalisation: dict[str, list[float]], runtime: Runtime) -> Views:
    seed = np.random.SeedSequence([config.seed, 1, runtime.rank]).generate_state(1, np.uint64)[0]
    return Views(
        config.data.views,
        splits.image_size,
        mean=normalisation["mean"],
        std=normalisation["std"],
        seed=int(seed) % 2**63,
        **config.augment.model_dump(),
    )


def build_state(
    config: Config, model: ContrastiveModel, loss: nn.Module, views: Views, runtime: Runtime
) -> TrainState:
    placed = place(model, runtime, channels_last=config.train.channels_last)
    parallel = distribute(placed, runtime, sync_bn=config.model.sync_bn)
    optim = config.optim
    return TrainState(
        model=placed,
        parallel=parallel,
        optimiser=build_optimiser(
            placed,
            name=optim.name,
            lr=peak_lr(config),
            momentum=optim.momentum,
            nesterov=optim.nesterov,
            weight_decay=optim.weight_decay,
        ),
        views=views.to(runtime.device),
        loss=loss.to(runtime.device),
        autocast=partial(autocast, runtime.device, config.train.precision),
        device=runtime.device,
    )


def peak_lr(config: Config) -> float:
    if config.optim.lr_per_256 is None:
        return config.optim.lr
    return config.optim.lr_per_256 * config.data.batch_size / 256


def build_plan(config: Config, steps_per_epoch: int) -> Plan:
    optim, save = config.optim, config.checkpoint
    steps = config.train.epochs * steps_per_epoch
    every = [save.every_steps or 0, (save.every_epochs or 0) * steps_per_epoch]
    return Plan(
        epochs=config.train.epochs,
        steps_per_epoch=steps_per_epoch,
        images_per_step=config.data.batch_size,
        lr=partial(
            learning_rate,
            peak=peak_lr(config),
            steps=steps,
            warmup_steps=round(optim.warmup_epochs * steps_per_epoch),
            schedule=optim.schedule,
            final_fraction=optim.final_lr_fraction,
        ),
        log_every=config.log.every_steps,
        save_at=lambda step: step == steps or any(n and step % n == 0 for n in every),
    )


def normalisation_of(train: Source) -> dict[str, list[float]]:
    """Mean and standard deviation per channel of the training images, as plain numbers."""
    mean, std = channel_statistics(train.stack())
    return {"mean": mean.tolist(), "std": std.tolist()}


def seed_models(config: Config) -> None:
    """Equal weights on every rank come from an equal seed."""
    torch.manual_seed(config.seed)
