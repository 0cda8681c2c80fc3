"""From the configuration to objects: the one place where settings become keyword arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from ..config import Config
from ..data import (
    ArraySource,
    CropOptions,
    LoaderOptions,
    Order,
    Source,
    Splits,
    Views,
    build_order,
    choose,
    load_splits,
    normalization_of,
)
from ..distributed.collectives import gather_objects, propagate_errors
from ..distributed.launch import Runtime
from ..errors import ConfigError, DataError
from ..models import PretrainingModel, build_encoder, recompute_activations
from .ema import WeightAverage
from .engine import ENGINES, LossScale, Parts, autocast, compiler, engine_options, place
from .finite_check import Guard
from .fit import Plan
from .momentum import MomentumQueue
from .objective import PAIRED, RESPONSE, Objective, build_head, heads_of, kind_of, response_term
from .optim import OPTIMIZER_SETTINGS, build_optimizer, learning_rate
from .state import TrainState
from .stopping import EarlyStopping


@dataclass(frozen=True)
class Data:
    """The data set of a run and how it is served: name of the loader, and why that one."""

    splits: Splits
    loader: str
    reason: str
    training: LoaderOptions
    evaluation: LoaderOptions


def load_data(config: Config, runtime: Runtime) -> Data:
    """The data set. Collective. Raises ConfigError, DataError, the same on every rank.

    Where the loader holds the set in memory every image is decoded here: damage is met before training.
    """
    data = config.data
    with propagate_errors():
        training = loader_options(config)
        splits = load_splits(
            data.source,
            root=data.root,
            download=data.download,
            image_size=data.image_size,
            channels=data.channels,
            validation_fraction=data.validation_fraction,
            train_images=data.train_images,
            seed=config.seed,
            synthetic=data.synthetic.model_dump() if data.source == "synthetic" else None,
            beton=data.beton,
            check_hash=runtime.launch.local_rank == 0,
        )
    name, reason = data.loader, "as configured"
    if name == "auto":  # by free memory, which differs between nodes: rank 0's choice is everybody's
        name, reason = gather_objects(choose(splits.train, runtime.device, training))[0]
    if name == "resident" and data.on_corrupt == "fail":
        with propagate_errors():
            validation = None if splits.validation is None else _decoded(splits.validation)
            splits = Splits(_decoded(splits.train), validation, _decoded(splits.test))
    return Data(splits, name, reason, training, replace(training, crop=None))


def loader_options(config: Config) -> LoaderOptions:
    """What the training loader is told. Raises ConfigError."""
    data, augment = config.data, config.augment
    crop = None
    if data.crop_while_decoding:
        if data.image_size is None:
            raise ConfigError("data.crop_while_decoding needs data.image_size: the side of the crops")
        if augment.policy == "none":
            raise ConfigError("data.crop_while_decoding crops at random, which augment.policy=none forbids")
        crop = CropOptions(data.views, data.image_size, augment.crop_scale, augment.crop_ratio)
    return LoaderOptions(data.workers, data.timeout_s, data.on_corrupt, crop)


def _decoded(source: Source) -> ArraySource:
    return source if isinstance(source, ArraySource) else ArraySource(source.stack(), source.labels, source.classes)


def check_objective(config: Config) -> None:
    """Raise ConfigError where loss, views, queue and the two-pass step contradict each other."""
    terms, name = config.loss.weights, config.loss.label
    kinds = [kind_of(term) for term in terms]
    if "simclr" in terms and config.data.views < 2:
        raise ConfigError("loss.name=simclr pulls an image's views together: it needs data.views of 2 or more")
    paired = [term for term, kind in zip(terms, kinds, strict=True) if kind.head in PAIRED]
    if not config.loss.supervised and not paired:
        raise ConfigError(f"loss.supervised=false: {name} compares no images; it needs their labels")
    if not config.loss.supervised and config.data.views < 2:
        raise ConfigError("loss.supervised=false pulls an image's views together: it needs data.views of 2 or more")
    if config.loss.queue_size and not any(kind.contrastive for kind in kinds):
        raise ConfigError(f"loss.queue_size={config.loss.queue_size}: {name} takes no queue; use 0")
    if config.model.momentum_encoder is not None and not config.loss.queue_size:
        raise ConfigError("model.momentum_encoder makes the keys of a queue: set loss.queue_size as well")
    if config.log.gradient_response and response_term(terms) is None:
        raise ConfigError(f"log.gradient_response is defined for one of {' and '.join(RESPONSE)}, not for {name}")
    if config.train.micro_batch_size is not None and any(kind.head == "decoder" for kind in kinds):
        raise ConfigError(f"train.micro_batch_size: {name} needs no large batch; lower data.batch_size instead")


def build_training_order(config: Config, splits: Splits) -> Order:
    """Which images share a batch, as `data.sampler` says. Raises ConfigError, DataError."""
    data = config.data
    return build_order(
        data.sampler,
        splits.train.labels,
        splits.classes,
        data.batch_size,
        classes_per_batch=data.classes_per_batch,
        images_per_class=data.images_per_class,
        long_tail_alpha=data.long_tail_alpha,
    )


def check_batches(config: Config, order: Order, splits: Splits) -> None:
    """Raise DataError when a batch of the first epoch has no two images to pull together."""
    if config.data.views > 1 or not any(kind_of(term).needs_pairs for term in config.loss.weights):
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
            "input_size": model.input_size,
        },
        "projection": {"hidden": model.projection_hidden, "out_dim": model.projection_dim},
        "heads": heads_of(config.loss.weights),
        "classes": list(splits.classes),
        "normalization": normalization_of(splits.train),
    }


def build_model(description: dict[str, Any]) -> PretrainingModel:
    """The model of `describe_model`, freshly initialized from the global generator. Raises ConfigError."""
    encoder = build_encoder(**description["encoder"])
    width = cast(int, encoder.feature_dim)
    return PretrainingModel(encoder, {head: build_head(head, description, width) for head in description["heads"]})


def build_objective(config: Config, views: Views) -> Objective:
    return Objective(config.loss.weights, config.loss.model_dump(), denormalize=views.denormalize)


def build_views(config: Config, description: dict[str, Any], runtime: Runtime, *, stream: int = 1) -> Views:
    """The random views; another `stream` draws other ones, without touching those of training (1)."""
    seed = np.random.SeedSequence([config.seed, stream, runtime.rank]).generate_state(1, np.uint64)[0]
    return Views(
        config.data.views,
        description["encoder"]["image_size"],
        **description["normalization"],
        seed=int(seed) % 2**63,
        channels_last=config.train.channels_last,
        **config.augment.model_dump(),
    )


def build_state(
    config: Config, model: PretrainingModel, objective: Objective, views: Views, runtime: Runtime
) -> TrainState:
    """The state of a run at its start. Collective. Raises ConfigError for what the engine refuses."""
    train, optim = config.train, config.optim
    placed = place(model, runtime, channels_last=train.channels_last, sync_bn=config.model.sync_bn)
    objective = objective.to(runtime.device)
    # copies of the model are made before an engine hangs its own things on it
    queue = None
    if config.loss.queue_size:
        queue = MomentumQueue(
            placed, config.loss.queue_size, config.model.projection_dim, config.model.momentum_encoder
        )
    ema = None if train.ema is None else WeightAverage(placed, train.ema)
    if train.activation_checkpointing:
        recompute_activations(placed.encoder)
    optimizer = partial(build_optimizer, lr=peak_lr(config), **optim.model_dump(include=OPTIMIZER_SETTINGS))
    parts = Parts(
        model=placed,
        objective=objective,
        runtime=runtime,
        make_optimizer=optimizer,
        sync_bn=config.model.sync_bn,
        compile=compiler(enabled=train.compile, cuda_graphs=train.cuda_graphs),
        scaler=LossScale() if train.precision == "fp16" else None,
    )
    engine = ENGINES[train.engine](parts, **engine_options(config, runtime))
    return TrainState(
        model=placed,
        engine=engine,
        views=views.to(runtime.device),
        objective=objective,
        # the scale of fp16 is decided on the host, and DeepSpeed's own copies cannot be put back: looked at at once
        guard=Guard(runtime.device, deferred=None if train.engine == "ddp" and engine.scaler is None else False),
        autocast=partial(autocast, runtime.device, train.precision),
        device=runtime.device,
        queue=queue,
        stopping=build_stopping(config),
        ema=ema,
        clip_norm=optim.clip_norm,
        micro_batch_size=train.micro_batch_size,
        # training orders share every global batch equally, and drop the last one that is not whole
        images_per_rank=[config.data.batch_size // runtime.world_size] * runtime.world_size,
    )


def build_stopping(config: Config) -> EarlyStopping | None:
    stop = config.train.stopping
    return None if stop.patience is None and stop.target is None else EarlyStopping(**stop.model_dump())


def peak_lr(config: Config) -> float:
    if config.optim.lr_per_256 is None:
        return config.optim.lr
    return config.optim.lr_per_256 * config.data.batch_size / 256


def build_plan(config: Config, steps_per_epoch: int) -> Plan:
    optim, save, look = config.optim, config.checkpoint, config.validation
    steps = config.train.iterations or config.train.epochs * steps_per_epoch

    def due(step: int, every_steps: int | None, every_epochs: int | None) -> bool:
        return any(n and step % n == 0 for n in (every_steps or 0, (every_epochs or 0) * steps_per_epoch))

    return Plan(
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        images_per_step=config.data.batch_size,
        lr=partial(
            learning_rate,
            peak=peak_lr(config),
            steps=steps,
            warmup_steps=optim.warmup_iterations or round(optim.warmup_epochs * steps_per_epoch),
            schedule=optim.schedule,
            final_fraction=optim.final_lr_fraction,
            milestones=optim.milestones,
            gamma=optim.gamma,
        ),
        log_every=config.log.every_steps,
        gradient_response=config.log.gradient_response,
        save_at=lambda step: step == steps or due(step, save.every_steps, save.every_epochs),
        validate_at=lambda step: due(step, look.every_steps, look.every_epochs),
    )


def seed_models(config: Config) -> None:
    """Equal weights on every rank come from an equal seed."""
    torch.manual_seed(config.seed)
