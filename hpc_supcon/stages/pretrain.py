"""Stage `pretrain`: from a configuration to a run folder with a trained encoder."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__, checkpoint, run_folder
from ..config import Config, digest
from ..data import EvalTransform, Loader, Views, build_loader
from ..distributed.collectives import propagate_errors
from ..distributed.launch import Runtime, seed_everything
from ..distributed.preemption import requested
from ..distributed.watchdog import current_watchdog
from ..errors import Preempted
from ..models import LoadedWeights, PretrainingModel, load_weights
from ..pruning import WeightMasks
from ..training import assemble
from ..training.engine import check_engine
from ..training.fit import Calls, fit
from ..training.garbage_collection import collected_every
from ..training.metrics import MetricLog, ProgressLine, console
from ..training.objective import Objective
from ..training.profile import Breakdown, StepProfile
from ..training.saving import checkpoint_writer, hold, hold_to_leave, resume_newest, save
from ..training.state import TrainState
from ..training.validation import VIEWS_STREAM, OnlineProbe, Validate, build_validate, check_validation


@dataclass(frozen=True)
class Start:
    """What training starts from in place of random weights: states of the model and of the objective."""

    model: dict[str, Tensor]
    objective: dict[str, Tensor]
    masks: dict[str, Tensor]
    """bool by the encoder's parameter, False where pruned; those weights stay zero."""


def pretrain(
    config: Config,
    runtime: Runtime,
    data: assemble.Data,
    *,
    resume: bool = False,
    online_probe: OnlineProbe | None = None,
    start: Start | None = None,
) -> Path:
    """Train encoder and heads; returns the run folder. Collective. `online_probe`: see validation.build_validate.

    Everything that can be wrong with the input is checked before the folder is made. With `resume`, goes on
    from the newest checkpoint that verifies, bit for bit on the same number of ranks.
    """
    folder = config.folder
    with propagate_errors():
        run_folder.check_usable(folder, config, resume=resume)
        made = _make(config, runtime, data, start, resume=resume)
    seed_everything(config.seed, runtime.rank)
    state = assemble.build_state(config, made.model, made.objective, made.views, runtime)
    state.masks = None if start is None else WeightMasks(state.model.encoder, start.masks)
    validate = _validate(config, runtime, data, made.description, online_probe)
    resumed = resume and resume_newest(state, folder, runtime, config)
    with propagate_errors():
        if runtime.is_main and not resumed:
            run_folder.create(folder, config)
    plan = assemble.build_plan(config, made.loader.steps_per_epoch)
    writer = checkpoint_writer(config, folder, runtime) if runtime.is_main else None
    held = partial(hold, folder=folder, writer=writer, description=made.description)
    with (
        current_watchdog().phase("saving"),  # not to be ended while the writer writes
        closing(made.loader),
        writer or nullcontext(),
        MetricLog(folder if runtime.is_main else None, tensorboard=config.log.tensorboard) as log,
        ProgressLine(plan.steps, plan.epochs, shown=runtime.is_main and config.log.progress) as progress,
    ):
        _tell_start(config, runtime, data, made, state.step, log, progress)
        began = time.perf_counter()
        with _at_every_step(config, state, folder, runtime, log) as stepped:
            calls = Calls(partial(save, held), validate, partial(hold_to_leave, held, writer), stepped)
            left = fit(state, made.loader, plan, calls, log=log, progress=progress)
        current_watchdog().exiting = left
        with propagate_errors():
            if writer is not None:
                writer.close()
        log.log("preempted" if left else "end", state.step, seconds=round(time.perf_counter() - began, 3))
    if left:
        raise Preempted(f"preempted ({requested()}): saved at step {state.step}; start again with --resume")
    return folder


@dataclass(frozen=True)
class _Made:
    """What a run is made of before it is placed on a device."""

    loader: Loader
    description: dict[str, Any]
    model: PretrainingModel
    views: Views
    objective: Objective
    weights: LoadedWeights | None


def _make(config: Config, runtime: Runtime, data: assemble.Data, start: Start | None, *, resume: bool) -> _Made:
    """Check all there is to check, then build. Raises ConfigError, DataError."""
    splits = data.splits
    assemble.check_objective(config)
    check_engine(config, runtime)
    check_validation(config, splits)
    order = assemble.build_training_order(config, splits)
    loader = build_loader(
        data.loader,
        splits.train,
        order,
        seed=config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
        options=data.training,
    )
    assemble.check_batches(config, order, splits)
    description = assemble.describe_model(config, splits)
    assemble.seed_models(config)
    model, views = assemble.build_model(description), assemble.build_views(config, description, runtime)
    weights = _load_weights(config, model, config.folder, resume=resume)
    objective = assemble.build_objective(config, views)
    _begin(start, model, objective)
    return _Made(loader, description, model, views, objective, weights)


def _tell_start(
    config: Config,
    runtime: Runtime,
    data: assemble.Data,
    made: _Made,
    step: int,
    log: MetricLog,
    progress: ProgressLine,
) -> None:
    log.log("start", step, world_size=runtime.world_size, **_facts(config, data, made.model))
    if made.weights is not None:
        log.log("weights", step, **asdict(made.weights))
        progress.say(made.weights.summary())
    if config.data.loader == "auto":
        progress.say(f"loader: {data.loader} ({data.reason})")


@contextmanager
def _at_every_step(
    config: Config, state: TrainState, folder: Path, runtime: Runtime, log: MetricLog
) -> Iterator[Callable[[int], None]]:
    """What `fit` calls after every step: garbage collection and, where it is asked for, the profile."""

    def report(found: Breakdown) -> None:
        log.log("profile", state.step, steps=found.steps, **found.numbers())
        console.print(found.table())

    steps = config.train.profile
    into = folder / run_folder.PROFILE if runtime.is_main else None
    profile = None if steps is None else StepProfile(steps, state.model, runtime.device, into, report)

    def stepped(step: int) -> None:
        collect(step)
        if profile is not None:
            profile.stepped()

    with collected_every(config.train.gc_every_steps) as collect, profile or nullcontext():
        yield stepped


def _begin(start: Start | None, model: PretrainingModel, objective: torch.nn.Module) -> None:
    """Before the model is wrapped or copied: averages and a momentum encoder start pruned as well."""
    if start is None:
        return
    model.load_state_dict(start.model)
    objective.load_state_dict(start.objective)
    WeightMasks(model.encoder, start.masks)


def _validate(
    config: Config, runtime: Runtime, data: assemble.Data, description: dict[str, Any], probe: OnlineProbe | None
) -> Validate | None:
    views = assemble.build_views(config, description, runtime, stream=VIEWS_STREAM).to(runtime.device)
    transform = EvalTransform(**description["normalization"]).to(runtime.device)
    return build_validate(config, data, views, transform, runtime, probe)


def _load_weights(config: Config, model: PretrainingModel, folder: Path, *, resume: bool) -> LoadedWeights | None:
    """The encoder's initial weights from `model.weights`; a checkpoint to go on from stands in for the file."""
    if config.model.weights is None or (resume and checkpoint.list_steps(folder / run_folder.CHECKPOINTS)):
        return None
    return load_weights(model.encoder, config.model.weights)


def _facts(config: Config, data: assemble.Data, model: torch.nn.Module) -> dict[str, Any]:
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_images": len(data.splits.train),
        "loader": data.loader,
        "engine": config.train.engine,
        "peak_lr": assemble.peak_lr(config),
        "config_digest": digest(config),
    }
