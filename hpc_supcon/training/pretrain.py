"""Stage `pretrain`: from a configuration to a run folder with a trained encoder."""

from __future__ import annotations

import platform
import time
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..collectives import barrier, gather_objects, raise_together, together
from ..config import Config, digest
from ..data import build_loader
from ..errors import HpcSupconError, WorldSizeMismatch
from ..models import LoadedWeights, PretrainingModel, load_weights
from ..runtime import Runtime, seed_everything
from . import assemble, checkpoint, run_folder
from .fit import fit
from .metrics import MetricLog, ProgressLine, console
from .state import TrainState


def pretrain(config: Config, runtime: Runtime, data: assemble.Data, *, resume: bool = False) -> Path:
    """Train encoder and projection; returns the run folder. Collective.

    Everything that can be wrong with the input is checked before the folder is made. With `resume`, goes on
    from the newest checkpoint that verifies, bit for bit on the same number of ranks.
    """
    folder, splits = config.folder, data.splits
    with together():
        run_folder.check_usable(folder, config, resume=resume)
        assemble.check_objective(config)
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
    seed_everything(config.seed, runtime.rank)
    state = assemble.build_state(config, model, objective, views, runtime)
    resumed = resume and _resume(state, folder, runtime)
    with together():
        if runtime.is_main and not resumed:
            run_folder.create(folder, config)
    plan = assemble.build_plan(config, loader.steps_per_epoch)
    save = partial(_save, folder=folder, config=config, runtime=runtime, description=description)
    shown = runtime.is_main and config.log.progress
    with (
        closing(loader),
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
        fit(state, loader, plan, log=log, progress=progress, save=save)
        log.log("end", state.step, seconds=round(time.perf_counter() - began, 3))
    return folder


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
        "peak_lr": assemble.peak_lr(config),
        "config_digest": digest(config),
    }


def _resume(state: TrainState, folder: Path, runtime: Runtime) -> bool:
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
        if saved_world != runtime.world_size:
            raise WorldSizeMismatch(
                f"{path}: saved by {saved_world} ranks, resumed on {runtime.world_size}; start {saved_world} ranks"
            )
        state.load(found.tensors, found.state["step"])
    if runtime.is_main:
        console.print(f"{folder}: going on from step {state.step}", soft_wrap=True)
    return True


def _save(state: TrainState, *, folder: Path, config: Config, runtime: Runtime, description: dict[str, Any]) -> None:
    """Collective: every rank contributes its generators, rank 0 writes, a failure is everybody's."""
    tensors = state.tensors()
    error: HpcSupconError | None = None
    if runtime.is_main:
        try:
            checkpoint.save(
                folder / run_folder.CHECKPOINTS,
                state.step,
                tensors,
                {"step": state.step, **description},
                world_size=runtime.world_size,
                config_digest=digest(config),
                keep=config.checkpoint.keep,
            )
        except HpcSupconError as caught:
            error = caught
    raise_together(error)
    barrier()
