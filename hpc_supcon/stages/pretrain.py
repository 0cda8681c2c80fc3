"""Stage `pretrain`: from a configuration to a run folder with a trained encoder."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__, checkpoint, run_folder
from ..config import Config, check_config, digest
from ..distributed.collectives import propagate_errors
from ..distributed.folder_lock import locked
from ..distributed.launch import Runtime
from ..distributed.preemption import handle_interrupts, interrupted, requested
from ..distributed.watchdog import current_watchdog
from ..environment import code_commit
from ..errors import Preempted
from ..notebook import in_notebook
from ..terminal import console, note, warn
from ..training.build import Start, build_training
from ..training.callbacks import Callback, Callbacks
from ..training.checkpointer import Checkpointer
from ..training.data import Data, check_classes_suffice
from ..training.engine import check_engine
from ..training.fit import fit
from ..training.metrics import MetricLog, ProgressLine
from ..training.plan import peak_lr
from ..training.profile import Breakdown, StepProfile
from ..training.resume import resume_newest
from ..training.state import Training
from ..training.validation import OnlineProbe, Validate, build_validate, check_validation_split


def pretrain(
    config: Config,
    runtime: Runtime,
    data: Data,
    *,
    resume: bool = False,
    online_probe: OnlineProbe | None = None,
    start: Start | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train encoder and heads; returns the run folder. Collective. `online_probe`: see validation.build_validate.

    All input is checked before the folder is made, and its lock held from then on. With `resume`, training continues
    from the newest checkpoint that verifies, bit for bit on the same number of ranks. In a single process, Ctrl-C
    saves after the step under way, then raises KeyboardInterrupt.
    """
    with locked(config.folder, runtime, warn):
        return _pretrain(config, runtime, data, resume, online_probe, start, callbacks)


def _pretrain(
    config: Config,
    runtime: Runtime,
    data: Data,
    resume: bool,
    online_probe: OnlineProbe | None,
    start: Start | None,
    callbacks: Sequence[Callback],
) -> Path:
    folder = config.folder
    with propagate_errors():
        run_folder.check_usable(folder, config, resume=resume)
        run_folder.check_checkpoints(folder)
        check_config(config, stages=("pretrain",), world_size=runtime.world_size)
        check_engine(config, runtime)
        check_classes_suffice(config, data.splits)
        check_validation_split(config, data.splits)
        is_saved = resume and bool(checkpoint.list_steps(folder / run_folder.CHECKPOINTS))
    training = build_training(config, data, runtime, start=start, load_weights=not is_saved)
    validate = build_validate(config, data, training, runtime, online_probe)
    resumed = resume and resume_newest(training.state, folder, runtime, config, data)
    with propagate_errors():
        if runtime.is_main and not resumed:
            run_folder.create(folder, config)
        elif runtime.is_main and (changed := run_folder.changed_parts(folder, config)):
            warn(f"{folder}: going on with other code (train.allow_code_change=true): {'; '.join(changed)}")
            run_folder.freeze_parts(folder, config)
    _train(config, runtime, data, training, validate, is_resume=resume, callbacks=callbacks)
    return folder


def _train(
    config: Config,
    runtime: Runtime,
    data: Data,
    training: Training,
    validate: Validate | None,
    *,
    is_resume: bool,
    callbacks: Sequence[Callback],
) -> None:
    """Run the loop inside of its log, progress bar, profile and signal handlers. Raises Preempted, KeyboardInterrupt
    and what `fit` raises."""
    plan, is_main, state, folder = training.plan, runtime.is_main, training.state, config.folder
    with (
        current_watchdog().phase("saving"),  # a save in the background may not be interrupted
        closing(training.loader),
        # several ranks are told by their launcher, with SIGTERM, so that they end together
        handle_interrupts() if runtime.world_size == 1 else nullcontext(),
        MetricLog(
            folder if is_main else None,
            config.log,
            resumed_at=state.step if is_resume and state.step < plan.steps else None,
            validated=state.last_validated_step,
        ) as log,
        ProgressLine(plan.steps, plan.epochs, shown=is_main and config.log.progress) as progress,
    ):
        _report_start(config, runtime, data, training, log, progress)
        began = time.perf_counter()
        with Checkpointer(config, training.description, runtime) as checkpointer:
            profile = _build_profile(config, training, runtime, log)
            with profile or nullcontext():
                left = fit(
                    training,
                    checkpointer,
                    validate,
                    log=log,
                    progress=progress,
                    after_step=profile.step if profile else lambda: None,
                    callbacks=Callbacks(callbacks),
                )
            current_watchdog().exiting = left and requested() is not None
        event, seconds = "preempted" if left else "end", round(time.perf_counter() - began, 3)
        log.log(event, state.step, seconds=seconds)
        is_interrupted = interrupted()
    if left and not is_interrupted:
        raise Preempted(f"preempted ({requested()}): saved at step {state.step}; start again with --resume")
    if is_interrupted:
        note(f"interrupted: saved at step {state.step}{'; resume the run to go on' if left else ''}")
        raise KeyboardInterrupt


def _report_start(
    config: Config, runtime: Runtime, data: Data, training: Training, log: MetricLog, progress: ProgressLine
) -> None:
    step, model = training.state.step, training.state.model
    facts: dict[str, Any] = {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **({"commit": code_commit(), **_machine(runtime)} if runtime.is_main else {}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train_images": len(data.splits.train),
        "steps_per_epoch": training.plan.steps_per_epoch,
        "loader": data.loader,
        "engine": config.train.engine,
        "peak_lr": peak_lr(config),
        "config_digest": digest(config),
    }
    log.log("start", step, world_size=runtime.world_size, **facts)
    if training.weights is not None:
        log.log("weights", step, **asdict(training.weights))
        progress.print(training.weights.summary())
    if facts["trained_parameters"] < facts["parameters"]:
        progress.print(_partly(config, facts, training.weights is None and step == 0))
    if training.state.views.left_out:
        progress.print(training.state.views.left_out)
    if config.data.loader == "auto":
        progress.print(f"loader: {data.loader} ({data.reason})")


def _partly(config: Config, facts: dict[str, Any], is_random: bool) -> str:
    """A line about a model of which a part is trained; is_random: it starts from random weights."""
    model = config.model
    what = f"adapters of rank {model.lora.rank} and heads" if model.train is None else ", ".join(model.train)
    frozen = "; the rest keeps its random weights: model.weights=null" if is_random else ""
    return f"trains {facts['trained_parameters']:,} of {facts['parameters']:,} parameters: {what}{frozen}"


def _machine(runtime: Runtime) -> dict[str, Any]:
    """What a page tells of where and how this process was started."""
    on_cuda = runtime.device.type == "cuda"
    called = Path(sys.argv[0]).name
    program = "python -m hpc_supcon" if called == "__main__.py" else called
    return {
        "command": "a notebook" if in_notebook() else f"{program} {shlex.join(sys.argv[1:])}",
        "host": platform.node(),
        "device": torch.cuda.get_device_name(runtime.device) if on_cuda else runtime.device.type,
        "threads": torch.get_num_threads(),
    }


def _build_profile(config: Config, training: Training, runtime: Runtime, log: MetricLog) -> StepProfile | None:
    """The profile that `train.profile` asks for; rank 0 measures."""
    state = training.state

    def report(found: Breakdown) -> None:
        log.log("profile", state.step, steps=found.steps, **found.numbers())
        console.print(found.table())

    if config.train.profile is None:
        return None
    folder = config.folder / run_folder.PROFILE if runtime.is_main else None
    return StepProfile(config.train.profile, state.model, runtime.device, folder, report)
