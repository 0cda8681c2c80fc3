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

from .. import __version__
from ..collectives import gather_objects, together
from ..config import Config, digest
from ..data import EvalTransform, build_loader
from ..errors import Preempted, WorldSizeMismatch
from ..models import LoadedWeights, PretrainingModel, load_weights
from ..phases import phase
from ..pruning import WeightMasks
from ..runtime import Runtime, seed_everything
from . import assemble, checkpoint, run_folder
from .checkpoint_writer import CheckpointWriter
from .engine import check_engine
from .fit import fit
from .garbage import collected_every
from .metrics import MetricLog, ProgressLine, console
from .preempt import requested
from .profile import Breakdown, StepProfile
from .state import TrainState
from .validation import VIEWS_STREAM, OnlineProbe, Validate, build_validate, check_validation


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
    folder, splits = config.folder, data.splits
    with together():
        run_folder.check_usable(folder, config, resume=resume)
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
        weights = _load_weights(config, model, folder, resume=resume)
        objective = assemble.build_objective(config, views)
        _begin(start, model, objective)
    seed_everything(config.seed, runtime.rank)
    state = assemble.build_state(config, model, objective, views, runtime)
    state.masks = None if start is None else WeightMasks(state.model.encoder, start.masks)
    validate = _validate(config, runtime, data, description, online_probe)
    resumed = resume and _resume(state, folder, runtime, config)
    with together():
        if runtime.is_main and not resumed:
            run_folder.create(folder, config)
    plan = assemble.build_plan(config, loader.steps_per_epoch)
    writer = _checkpoint_writer(config, folder, runtime) if runtime.is_main else None
    hold = partial(_hold, writer=writer, description=description)
    shown = runtime.is_main and config.log.progress
    with (
        closing(loader),
        writer or nullcontext(),
        MetricLog(folder if runtime.is_main else None, tensorboard=config.log.tensorboard) as log,
        ProgressLine(plan.steps, plan.epochs, shown=shown) as progress,
    ):
        log.log("start", state.step, world_size=runtime.world_size, **_facts(config, data, model))
        if weights is not None:
            log.log("weights", state.step, **asdict(weights))
            if shown:
                console.print(weights.summary(), soft_wrap=True)
        if shown and config.data.loader == "auto":
            console.print(f"loader: {data.loader} ({data.reason})", soft_wrap=True)
        began = time.perf_counter()
        with _at_every_step(config, state, folder, runtime, log) as stepped:
            left = fit(
                state, loader, plan, log=log, progress=progress, save=partial(_save, hold), validate=validate,
                hold=partial(_hold_to_leave, hold, writer), stepped=stepped,
            )  # fmt: skip
        with together():
            if writer is not None:
                writer.close()
        log.log("left" if left else "end", state.step, seconds=round(time.perf_counter() - began, 3))
    if left:
        raise Preempted(f"left ({requested()}): saved at step {state.step}; start again with --resume")
    return folder


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
    transform = EvalTransform(**description["normalisation"]).to(runtime.device)
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


def _resume(state: TrainState, folder: Path, runtime: Runtime, config: Config) -> bool:
    """Load the newest checkpoint that verifies into `state`; False when the run has not saved one yet.

    Rank 0 chooses and the others load the same one: each choosing for itself could part them.
    """
    found: checkpoint.Checkpoint | None = None
    with together():
        if runtime.is_main:
            found, refused = checkpoint.load_newest(folder / run_folder.CHECKPOINTS)
            for line in refused:
                console.print(f"not used: {line}", soft_wrap=True, style="yellow")
    path = gather_objects(found.path if found else None)[0]
    if path is None:
        if runtime.is_main:
            console.print(f"{folder}: no checkpoint yet, starting from step 0", soft_wrap=True)
        return False
    with together():
        found = found or checkpoint.load(path)
        saved_world = found.manifest["world_size"]
        if saved_world != runtime.world_size and not config.train.allow_world_size_change:
            raise WorldSizeMismatch(
                f"{path}: saved by {saved_world} ranks, resumed on {runtime.world_size}; start {saved_world} ranks, "
                "or set train.allow_world_size_change=true"
            )
        with checkpoint.understood(path):
            state.load(found.tensors, found.state)
        if runtime.rank >= saved_world:
            _seed_new_rank(state, config, found.state, runtime)
    if runtime.is_main:
        changed = saved_world != runtime.world_size
        note = f" (saved by {saved_world} ranks, going on with {runtime.world_size})" if changed else ""
        console.print(f"{folder}: going on from step {state.step}{note}", soft_wrap=True)
    return True


def _seed_new_rank(state: TrainState, config: Config, description: dict[str, Any], runtime: Runtime) -> None:
    """Generators of a rank that did not exist when the checkpoint was saved: from seed, rank and step, so that
    nothing is drawn again that a rank of this number may have drawn earlier in the run."""
    seed_everything(config.seed, runtime.rank, state.step)
    views = assemble.build_views(config, description, runtime, stream=VIEWS_STREAM + state.step)
    state.views.load_state(views.to(runtime.device).state())


def _checkpoint_writer(config: Config, folder: Path, runtime: Runtime) -> CheckpointWriter:
    settings = config.checkpoint
    save = partial(
        checkpoint.save,
        folder / run_folder.CHECKPOINTS,
        world_size=runtime.world_size,
        config_digest=digest(config),
        keep=settings.keep,
        keep_every=settings.keep_every_steps,
        trusted=set(),
    )
    return CheckpointWriter(
        save,
        asynchronous=settings.asynchronous,
        max_failed=settings.max_failed_saves,
        tell=lambda line: console.print(line, soft_wrap=True, style="yellow", markup=False),
    )


def _hold(state: TrainState, *, writer: CheckpointWriter | None, description: dict[str, Any]) -> Callable[[], None]:
    """What saves the state as it is now. Collective: every rank contributes its generators, rank 0 has the writer."""
    tensors, numbers, protect = state.tensors(), {**state.numbers(), **description}, state.best_steps()

    def write() -> None:
        if writer is not None:
            writer.save(numbers["step"], tensors, numbers, protect=protect)

    return write


@phase("checkpoint")
def _save(hold: Callable[[TrainState], Callable[[], None]], state: TrainState) -> None:
    """Collective; a failure is everybody's."""
    write = hold(state)
    with together():
        write()


def _hold_to_leave(
    hold: Callable[[TrainState], Callable[[], None]], writer: CheckpointWriter | None, state: TrainState
) -> Callable[[], None]:
    """As `_hold`; what is returned comes back when all is on disk."""
    write = hold(state)

    def write_and_close() -> None:
        write()
        if writer is not None:
            writer.close()

    return write_and_close
