"""Rules between settings: what can be wrong with a configuration, as far as its data and device do not matter.

What depends on the data (numbers of images and classes, image sizes) is checked once it is loaded; what depends on
the machine (GPUs, compilers, optional packages) when training is set up.
"""

from __future__ import annotations

from typing import Literal, get_args

from ..errors import ConfigError
from .check_channels import check_channels
from .check_data import check_data
from .check_evaluation import check_probes, check_pruning, check_report, check_target, has_no_validation
from .check_labels import check_labels
from .check_model import check_model
from .check_parts import check_parts
from .check_views import check_views
from .deepspeed import check_own_keys
from .encoders import check_encoder
from .schema import Config, names

Stage = Literal["pretrain", "probe", "prune"]

CONTRASTIVE = frozenset(get_args(names.ContrastiveName))
WITH_TARGET = frozenset(get_args(names.TargetName))
PAIRWISE = frozenset(get_args(names.PairwiseName))
CLASSIFYING = frozenset(get_args(names.ClassifierLossName))
DECODING = frozenset(get_args(names.DecoderLossName))
WITH_RESPONSE = frozenset(get_args(names.ResponseLossName))
MIN_TEMPERATURE, MIN_TRITON_TEMPERATURE, MAX_TRITON_DIM = 0.002, 0.025, 2048
"""What the contrastive losses take: see losses.temperature."""


def check_config(
    config: Config, *, stages: tuple[Stage, ...] = ("pretrain", "probe"), world_size: int | None = None
) -> None:
    """Raise ConfigError where settings contradict each other. Reads neither data nor device.

    stages: those that will run; what only others use is not checked. world_size: of the ranks, where it is known.
    """
    if stages:
        check_parts(config, stages)
        check_data(config)
        check_channels(config, stages)
        check_labels(config, stages)
    if "pretrain" in stages:
        check_encoder(config.model.encoder)
    if _pretrains(config, stages):
        check_model(config)
        _check_loss(config)
        check_views(config)
        _check_queue(config)
        _check_sampler(config)
        _check_validation(config)
        _check_stopping(config)
        _check_device(config)
        _check_engine(config)
        _check_compilation(config)
    if "probe" in stages or "prune" in stages:
        check_probes(config)
    if "probe" in stages:
        check_report(config)
    if "prune" in stages:
        check_pruning(config)
    if world_size is not None:
        check_ranks(config, world_size, stages=stages)


def check_ranks(config: Config, world_size: int, *, stages: tuple[Stage, ...]) -> None:
    """The rules of `check_config` that need the number of ranks. Raises ConfigError."""
    if _pretrains(config, stages) or ("prune" in stages and config.prune.finetunes):
        _check_shares("data.batch_size", config.data.batch_size, world_size)
        _check_pieces(config, world_size)
        _check_graphs(config, world_size)
    if "probe" in stages or "prune" in stages:
        for kind in filter(config.probe.trains_on_images, config.probe.kinds):
            _check_shares(f"probe.{kind}.batch_size", getattr(config.probe, kind).batch_size, world_size)


def _pretrains(config: Config, stages: tuple[Stage, ...]) -> bool:
    """A run whose probes all read pixels trains no encoder."""
    return "pretrain" in stages and (config.probe.needs_encoder or "probe" not in stages)


def _check_shares(setting: str, batch_size: int, world_size: int) -> None:
    if batch_size % world_size:
        below = batch_size // world_size * world_size
        valid = f"{below} or {below + world_size}" if below else f"{world_size}"
        raise ConfigError(
            f"{setting}={batch_size} is the global batch and cannot be shared equally by {world_size} ranks: "
            f"use {valid}"
        )


def _check_pieces(config: Config, world_size: int) -> None:
    images, piece = config.data.batch_size // world_size, config.train.micro_batch_size
    if config.train.cuda_graphs and piece is not None and images % piece:
        raise ConfigError(
            f"train.cuda_graphs=true needs pieces of equal size, but {images} images per rank in pieces of "
            f"train.micro_batch_size={piece} leave a smaller last one; use a divisor of {images}"
        )


def _check_graphs(config: Config, world_size: int) -> None:
    if config.train.cuda_graphs and world_size > 1:
        raise ConfigError(
            f"train.cuda_graphs=true: the pass of {world_size} ranks exchanges statistics and gradients, which a "
            "replayed graph does not wait for; use train.cuda_graphs=false, or one rank"
        )


def _check_loss(config: Config) -> None:
    loss, terms, views = config.loss, config.loss.weights.keys(), config.data.views_per_image
    if "simclr" in terms and views < 2:
        raise ConfigError("loss.name=simclr pulls an image's views together: it needs data.views of 2 or more")
    if not loss.supervised and not terms & PAIRWISE and not loss.own:
        raise ConfigError(f"loss.supervised=false: {loss.label} compares no images; it needs their labels")
    if not loss.supervised and views < 2:
        raise ConfigError("loss.supervised=false pulls an image's views together: it needs data.views of 2 or more")
    if config.log.gradient_response and len(terms & WITH_RESPONSE) != 1:
        raise ConfigError(
            f"log.gradient_response is defined for one of {' and '.join(sorted(WITH_RESPONSE))}, not for {loss.label}"
        )
    if config.train.micro_batch_size is not None and terms & DECODING:
        raise ConfigError(f"train.micro_batch_size: {loss.label} needs no large batch; lower data.batch_size instead")
    if not terms & CONTRASTIVE:
        return
    if loss.temperature < MIN_TEMPERATURE:
        raise ConfigError(
            f"loss.temperature={loss.temperature:g} is below {MIN_TEMPERATURE}, where exp(1 / temperature) overflows"
        )
    dim = config.model.projection_dim
    if loss.backend == "triton" and (loss.temperature < MIN_TRITON_TEMPERATURE or dim > MAX_TRITON_DIM):
        raise ConfigError(
            f"loss.backend=triton: loss.temperature={loss.temperature:g} and model.projection_dim={dim} must be at "
            f"least {MIN_TRITON_TEMPERATURE} and at most {MAX_TRITON_DIM}; use loss.backend=tiled"
        )
    if loss.backend == "triton" and loss.precision == "fp32":
        raise ConfigError(
            "loss.precision=fp32: the kernels of loss.backend=triton multiply on tensor cores, which have no fp32; "
            "use loss.precision=tf32, or loss.backend=tiled for exact products"
        )
    if loss.backend in ("reference", "tiled") and loss.precision in ("bf16", "tf32"):
        raise ConfigError(
            f"loss.precision={loss.precision} is a format of loss.backend=triton; use auto or fp32 with "
            f"loss.backend={loss.backend}"
        )


def _check_queue(config: Config) -> None:
    loss, model, terms = config.loss, config.model, config.loss.weights.keys()
    with_target = sorted(terms & WITH_TARGET)
    if loss.queue_size and not terms & (CONTRASTIVE | {"moco_v2", "swav"}):
        raise ConfigError(f"loss.queue_size={loss.queue_size}: {loss.label} takes no queue; use 0")
    if "moco_v2" in terms and not loss.queue_size:
        raise ConfigError("loss.name=moco_v2 compares with a queue of keys: set loss.queue_size (published: 65536)")
    if "moco_v2" in terms and not model.sync_bn:
        raise ConfigError(
            "model.sync_bn=false: BatchNorm per rank tells moco_v2 which key belongs to an image; use true"
        )
    if with_target and model.momentum_encoder is None:
        raise ConfigError(
            f"loss.name={with_target[0]} aims at a momentum target: set model.momentum_encoder "
            "(BYOL: 0.996, MoCo: 0.999)"
        )
    if model.momentum_encoder is not None and not with_target and not (loss.queue_size and terms & CONTRASTIVE):
        raise ConfigError("model.momentum_encoder makes the keys of a queue: set loss.queue_size as well")
    if loss.keys == "momentum":
        _check_keys(config)
    if model.momentum_final is not None and not with_target:
        raise ConfigError(
            f"model.momentum_final is for {' and '.join(sorted(WITH_TARGET))}, not for {loss.label}; use null"
        )


def _check_keys(config: Config) -> None:
    loss, model = config.loss, config.model
    if not loss.weights.keys() & CONTRASTIVE:
        raise ConfigError(f"loss.keys=momentum is for {', '.join(sorted(CONTRASTIVE))}, not for {loss.label}")
    if model.momentum_encoder is None or not loss.queue_size:
        raise ConfigError("loss.keys=momentum: set model.momentum_encoder (MoCo: 0.999) and loss.queue_size as well")
    if not model.sync_bn:
        raise ConfigError(
            "model.sync_bn=false: BatchNorm per rank tells which key belongs to an image; use true with "
            "loss.keys=momentum"
        )
    if loss.backend == "triton":
        raise ConfigError(
            "loss.backend=triton compares a batch with itself; use auto or tiled with loss.keys=momentum"
        )
    if config.log.gradient_response:
        raise ConfigError("log.gradient_response compares a batch with itself; use false with loss.keys=momentum")


def _check_sampler(config: Config) -> None:
    """Whether there are enough classes, and images of each, is known once the data is loaded."""
    data = config.data
    if data.sampler != "class_balanced":
        return
    if data.classes_per_batch is None or data.images_per_class is None:
        raise ConfigError(
            "data.sampler=class_balanced needs data.classes_per_batch and data.images_per_class, whose product is "
            f"data.batch_size={data.batch_size}"
        )
    product = data.classes_per_batch * data.images_per_class
    if product != data.batch_size:
        raise ConfigError(
            f"data.classes_per_batch={data.classes_per_batch} times data.images_per_class={data.images_per_class} is "
            f"{product}, not data.batch_size={data.batch_size}"
        )


def _check_validation(config: Config) -> None:
    enabled, probe = config.validation.enabled, config.validation.probe
    if enabled and has_no_validation(config):
        raise ConfigError("validation.every_* needs a validation split: set data.validation_fraction")
    if probe.kind != "none" and not enabled:
        raise ConfigError(
            f"validation.probe.kind={probe.kind} is fitted at every validation: set validation.every_epochs or "
            "validation.every_steps"
        )
    if probe.kind == "knn" and probe.k > probe.images:
        raise ConfigError(f"validation.probe.k={probe.k} neighbors, but validation.probe.images={probe.images}")


def _check_stopping(config: Config) -> None:
    stopping = config.train.stopping
    if not stopping.enabled:
        return
    if not config.validation.enabled:
        raise ConfigError("train.stopping needs validation: set validation.every_epochs or validation.every_steps")
    if stopping.monitor != "accuracy":
        return
    if config.validation.probe.kind == "none" and not CLASSIFYING & config.loss.weights.keys():
        raise ConfigError(
            f"train.stopping.monitor=accuracy: {config.loss.label} has no classifier; set validation.probe.kind=knn "
            "or linear"
        )
    check_target("train", stopping.monitor, stopping.target)


def _check_device(config: Config) -> None:
    if config.runtime.device != "cpu":
        return
    if config.train.precision == "fp16":
        raise ConfigError("train.precision=fp16 needs a CUDA device; use bf16 or fp32 with runtime.device=cpu")
    if config.train.cuda_graphs:
        raise ConfigError("train.cuda_graphs=true needs a CUDA device, not runtime.device=cpu")


def _check_engine(config: Config) -> None:
    train, zero = config.train, config.train.deepspeed.zero
    if train.engine != "deepspeed":
        if train.deepspeed.config is not None:
            raise ConfigError("train.deepspeed.config is for train.engine=deepspeed alone; use null")
        return
    check_own_keys(train.deepspeed.config or {})
    if zero == 2 and train.micro_batch_size is not None:
        raise ConfigError(
            "train.micro_batch_size with train.deepspeed.zero=2: partitioned gradients would be exchanged for every "
            "piece; use zero 0 or 1, or train.engine=ddp"
        )
    if zero and config.optim.name in ("lars", "lamb"):
        raise ConfigError(
            f"optim.name={config.optim.name} needs the norm of every weight, which train.deepspeed.zero={zero} cuts "
            "into parts; use zero 0, or train.engine=ddp"
        )


def _check_compilation(config: Config) -> None:
    train = config.train
    if train.cuda_graphs and not train.compile:
        raise ConfigError("train.cuda_graphs=true replays the compiled pass: set train.compile=true as well")
    if train.cuda_graphs and train.engine == "deepspeed":
        raise ConfigError("train.cuda_graphs=true: deepspeed changes gradients in place; use train.engine=ddp")
    if train.compile and train.activation_checkpointing:
        raise ConfigError("train.activation_checkpointing: train.compile decides what to recompute; use one of them")
