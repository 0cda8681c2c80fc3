"""From the configuration to objects: the one place where settings become keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..data import MultiCrop, Splits, Views, normalization_of
from ..distributed.agreement import ranks_that_differ
from ..distributed.collectives import propagate_errors
from ..distributed.launch import Runtime
from ..errors import RanksDiffer
from ..losses import loss_spec
from ..models import (
    LoadedWeights,
    PretrainingModel,
    adapt,
    apply_activation_checkpointing,
    build_without_adapters,
    check_deterministic,
    check_sizes,
    train_only,
)
from ..models import load_weights as load_pretrained
from ..pruning import GradualPruning, WeightMasks
from ..seeding import seed_global_generators, stream
from .agreement import STATE_KEY
from .data import Data, build_training_loader
from .ema import MomentumQueue, MomentumTarget, WeightAverage, momentum_at
from .engine import ENGINES, EngineParts, LossScale, autocast, compiler, loss_precision, place
from .objective import Objective, heads_of, needs_target
from .optim import OPTIMIZER_SETTINGS, build_optimizer
from .plan import TrainingPlan, build_plan, build_stopping, peak_lr
from .state import StepOptions, Training, TrainState


@dataclass(frozen=True)
class Start:
    """What training starts from in place of random weights."""

    model: PretrainingModel
    """Trained in place of a new model; of the architecture that the configuration describes."""
    objective: Mapping[str, Tensor] | None = None
    """State of the objective; None: as the configuration says."""
    masks: Mapping[str, Tensor] | None = None
    """bool by the encoder's parameter, False where pruned: those weights stay zero. None: nothing is pruned."""
    gradual: GradualPruning | None = None
    """Prunes more while training; None: `masks` stay as they are."""


def build_training(
    config: Config, data: Data, runtime: Runtime, *, start: Start | None = None, load_weights: bool = True
) -> Training:
    """Everything that training needs, at step 0. Collective.

    load_weights: start from `model.weights` where it is set; False where a checkpoint is loaded afterwards. Raises
    ConfigError, DataError, MissingExtra, UnsafeWeights and what the loader raises, the same on every rank.
    """
    with propagate_errors():
        loader = build_training_loader(config, data, runtime)
        description = describe_model(config, data.splits) | {STATE_KEY: data.fingerprint.as_json()}
        weights = None
        if start is not None:
            model = start.model
        else:
            model, weights = initial_model(config, description, load_weights=load_weights)
        if config.model.train is not None:
            train_only(model, config.model.train)
        check_deterministic(model.encoder, config.model.encoder, description["encoder"], runtime.device)
        views = build_views(config, description)
        if isinstance(views, MultiCrop):
            check_sizes(
                model.encoder, config.model.encoder, views.channels, [part.image_size for part in views.parts]
            )
        plan = build_plan(config, loader.steps_per_epoch)
        objective = _build_objective(config, model, views, plan, runtime)
        if start is not None and start.objective is not None:
            objective.load_state_dict(start.objective)
        if start is not None and start.masks is not None:
            # before the model is copied or wrapped: a weight average and a momentum encoder start pruned as well
            WeightMasks(model.encoder, start.masks)
    _check_same_weights(weights)
    seed_global_generators(stream(config.seed, "layers", runtime.rank))
    state = _build_state(config, model, objective, views, runtime)
    if start is not None and start.masks is not None:
        state.masks = WeightMasks(state.model.encoder, start.masks)
    state.gradual = None if start is None else start.gradual
    return Training(state, _step_options(config, runtime), loader, plan, description, weights)


def initial_model(
    config: Config, description: Mapping[str, Any], *, load_weights: bool = True
) -> tuple[PretrainingModel, LoadedWeights | None]:
    """(the model that training starts from, on the CPU, what it got of `model.weights`). Seeds PyTorch's generators.

    description: of `describe_model`, or of a checkpoint of the run. Raises ConfigError, UnsafeWeights.
    """
    torch.manual_seed(stream(config.seed, "model"))  # the same on all ranks, so that their weights are equal
    model, weights = build_without_adapters(description), None
    if load_weights and config.model.weights is not None:
        weights = load_pretrained(model.encoder, config.model.weights)
    adapt(model, description)
    return model, weights


def _build_objective(
    config: Config, model: PretrainingModel, views: Views | MultiCrop, plan: TrainingPlan, runtime: Runtime
) -> Objective:
    """What `model` is trained to minimize; a momentum target starts as its copy."""
    settings = {
        **config.loss.model_dump(),
        "options": {name: config.loss.options_of(name) for name in config.loss.own},
        "precision": loss_precision(runtime.device, config.loss.precision, config.train.precision),
        # of MoCo's queue, and of the prototypes of SwAV and DINO
        "projection_dim": config.model.projection_dim,
        "views": config.data.views_per_image,
        "global_views": config.data.crops[0],
        "seed": stream(config.seed, "loss"),
        "steps_per_epoch": plan.steps_per_epoch,
        "queue_start_steps": config.loss.queue_start_epoch * plan.steps_per_epoch,
        "frozen_steps": round(config.loss.frozen_epochs * plan.steps_per_epoch),
    }
    target = None
    if needs_target(config.loss.weights):
        base = config.model.momentum_encoder
        assert base is not None  # see config.check
        momentum = partial(momentum_at, base=base, final=config.model.momentum_final, steps=plan.steps)
        target = MomentumTarget(model, momentum)
    return Objective(config.loss.weights, settings, target=target, denormalize=views.denormalize)


def _check_same_weights(weights: LoadedWeights | None) -> None:
    """Raise RanksDiffer where a rank read another file of `model.weights` than rank 0. Collective."""
    if different := ranks_that_differ(None if weights is None else weights.sha256):
        raise RanksDiffer(
            f"model.weights: the file of rank {different[0]} has another content than that of rank 0; give all ranks "
            "the same file"
        )


def describe_model(config: Config, splits: Splits) -> dict[str, Any]:
    """What a checkpoint holds so that `models.build_model` can build its model again without the data set."""
    model = config.model
    return {
        "encoder": {
            "name": model.encoder,
            "in_channels": splits.channels,
            "image_size": splits.image_size,
            "stem": model.stem,
            "out_dim": model.out_dim,
            "input_size": model.input_size,
            # left out where there are none, as in checkpoints from before there were any
            **({} if model.channels is None else {"channels": {k: list(v) for k, v in model.channels.items()}}),
            **({} if not model.options else {"options": model.options}),
        },
        "projection": {
            "hidden": model.projection_hidden,
            "out_dim": model.projection_dim,
            "layers": model.projection_layers,
            "norm": model.projection_norm,
            # left out as "channels" above
            **({} if model.projection_activation == "relu" else {"activation": model.projection_activation}),
            "unit": not any(loss_spec(name).raw for name in config.loss.weights),
        },
        # left out where there are none, as are the narrower layers
        **({} if model.lora.rank is None else {"lora": model.lora.model_dump()}),
        "predictor": {"hidden": model.predictor_hidden},
        "heads": heads_of(config.loss.weights),
        "classes": list(splits.classes),
        "normalization": normalization_of(splits.train),
    }


def build_views(config: Config, description: dict[str, Any], *, seed: int = 0) -> Views | MultiCrop:
    """The random views; `seed`: of a stream. Training reseeds them in every step."""
    many, few = config.data.crops
    settings = config.augment.model_dump(exclude={"local"})
    settings |= {**description["normalization"], "channels_last": config.train.channels_last}
    views = Views(many, description["encoder"]["image_size"], **settings, seed=seed)
    if not few:
        return views
    local = config.augment.local.model_dump()
    both = MultiCrop(views, Views(few, local.pop("image_size"), **{**settings, **local, "crop": "resized"}))
    both.reseed(seed)
    return both


def _build_state(
    config: Config, model: PretrainingModel, objective: Objective, views: Views | MultiCrop, runtime: Runtime
) -> TrainState:
    """The state of a run at its start. Collective. Raises ConfigError for what the engine refuses."""
    train, optim = config.train, config.optim
    put = partial(place, runtime=runtime, channels_last=train.channels_last, sync_bn=config.model.sync_bn)
    placed = put(model, compiled=train.compile)
    objective = objective.to(runtime.device)
    if objective.target is not None:
        objective.target.network = put(objective.target.network)
    # copies of the model are made before it is wrapped, and before its blocks are changed to recompute activations
    queue = None
    if config.loss.queue_size and any(spec.contrastive for spec in objective.specs.values()):
        queue = MomentumQueue(
            placed,
            config.loss.queue_size,
            config.model.projection_dim,
            config.model.momentum_encoder,
            of_batch=config.loss.keys == "momentum",
        )
    ema = None if train.ema is None else WeightAverage(placed, train.ema)
    if train.activation_checkpointing:
        apply_activation_checkpointing(placed.encoder)
    keeps_rate = optim.predictor_schedule == "constant"
    optimizer = partial(
        build_optimizer,
        lr=peak_lr(config),
        constant=list(placed.heads["prediction"].parameters()) if keeps_rate else [],
        **optim.model_dump(include=OPTIMIZER_SETTINGS),
    )
    parts = EngineParts(
        model=placed,
        objective=objective,
        runtime=runtime,
        make_optimizer=optimizer,
        sync_bn=config.model.sync_bn,
        compile=compiler(enabled=train.compile, cuda_graphs=train.cuda_graphs),
        scaler=LossScale() if train.precision == "fp16" else None,
    )
    return TrainState(
        model=placed,
        engine=ENGINES[train.engine](parts, **_engine_options(config, runtime)),
        views=views.to(runtime.device),
        objective=objective,
        device=runtime.device,
        queue=queue,
        ema=ema,
        stopping=build_stopping(config),
    )


def _engine_options(config: Config, runtime: Runtime) -> dict[str, Any]:
    """What `train.engine` takes in addition to its EngineParts."""
    if config.train.engine != "deepspeed":
        return {}
    deepspeed = config.train.deepspeed
    images = config.data.batch_size // runtime.world_size
    return {"zero": deepspeed.zero, "user_config": deepspeed.config, "images_per_rank": images}


def _step_options(config: Config, runtime: Runtime) -> StepOptions:
    train = config.train
    return StepOptions(
        autocast=partial(autocast, runtime.device, train.precision),
        clip_norm=config.optim.clip_norm,
        micro_batch_size=train.micro_batch_size,
        seed=config.seed,
        rank=runtime.rank,
        # the order of training shares every global batch equally, and drops the last one when it is incomplete
        images_per_rank=[config.data.batch_size // runtime.world_size] * runtime.world_size,
        # with fp16 the host reads loss and norm in every step anyway
        defer_finite_check=runtime.device.type == "cuda" and train.engine == "ddp" and train.precision != "fp16",
    )
