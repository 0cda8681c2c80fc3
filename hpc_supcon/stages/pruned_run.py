"""One pruning of a run: its settings and folder, and the model that its fine-tuning starts from."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint, run_folder
from ..checkpoint.layout import path_of
from ..config import Config, flatten_data
from ..distributed.collectives import propagate_errors
from ..distributed.launch import Runtime
from ..errors import ConfigError, RunFolderError
from ..evaluation.classifier import with_classifier, with_cross_entropy
from ..models import PretrainingModel, build_model, merged
from ..models import load_weights as load_pretrained
from ..pruning import GradualPruning, WeightMasks
from ..seeding import stream
from ..training.build import Start
from ..training.data import Data, build_training_order
from ..training.plan import peak_lr
from ..training.validation import undisturbed
from .pruned_weights import Masks

PRUNED = "pruned"
DEFAULT_LR_FACTOR = 0.1
"""Learning rate of fine-tuning relative to that of pre-training, where prune.finetune.lr is null."""


def pruned_config(folder: Path, config: Config, rate: float) -> Config:
    """The settings of one rate's run folder: the run's own, with those of `prune.finetune` for the training."""
    settings = _settings(config, rate)
    name = _name(config, rate)
    kinds = tuple(kind for kind in config.probe.kinds if config.probe.input_of(kind) != "pixels")
    changes: dict[str, Any] = {
        "name": f"{config.name}-{name}",
        "run_dir": str(folder / PRUNED / name),
        "prune": settings,
        "probe": config.probe.model_copy(update={"kind": kinds}),
    }
    if settings.finetunes:
        # the folder's config.yaml says how it was fine-tuned, not how the dense run was trained
        tuned = with_cross_entropy(config) if settings.finetune.loss == "cross_entropy" else config
        changes |= {"loss": tuned.loss, "log": tuned.log, "train": _train(config), "optim": _optim(config)}
        changes["model"] = tuned.model.model_copy(update={"weights": None})
    # the adapters are merged; weights that were not trained are pruned and fine-tuned as well
    changes["model"] = changes.get("model", config.model).trained_whole
    return config.model_copy(update=changes)


def _settings(config: Config, rate: float) -> Any:
    """The section `prune` of one rate; without fine-tuning in a round after which there is none."""
    prune = config.prune
    changes: dict[str, Any] = {"rate": rate}
    if prune.pattern is not None:
        changes["rate"] = round(1 - prune.pattern[0] / prune.pattern[1], 4)
    if prune.schedule == "iterative" and not prune.finetune.between and rate != prune.rounds[-1]:
        changes["finetune"] = prune.finetune.model_copy(update={"epochs": 0, "iterations": None})
    return prune.model_copy(update=changes)


def _name(config: Config, rate: float) -> str:
    prune = config.prune
    parts = [prune.method, prune.scope.replace(":", "of")]
    parts += [f"{rate:g}"] if prune.pattern is None else []
    parts += [prune.schedule] if prune.schedule != "oneshot" else []
    parts += [prune.label] if prune.label else []
    return "-".join(parts)


def _train(config: Config) -> Any:
    tune = config.prune.finetune
    changes: dict[str, Any] = {
        "epochs": tune.epochs or config.train.epochs,
        "iterations": tune.iterations,
        # ddp: ZeRO keeps its own copies of the weights, which masks do not reach
        "engine": "ddp",
        "deepspeed": config.train.deepspeed.model_copy(update={"config": None}),
    }
    if config.prune.schedule == "gradual":
        # the best evaluation may come before the rate is reached
        changes["stopping"] = config.train.stopping.model_copy(update={"patience": None, "target": None})
    return config.train.model_copy(update=changes)


def _optim(config: Config) -> Any:
    tune = config.prune.finetune
    factor = DEFAULT_LR_FACTOR if config.prune.rewind is None else 1.0
    return config.optim.model_copy(
        update={
            "lr": tune.lr if tune.lr is not None else factor * peak_lr(config),
            "lr_per_256": None,
            "schedule": tune.schedule,
            "warmup_epochs": tune.warmup_epochs,
            "warmup_iterations": 0,
            "final_lr_fraction": 0.0,
        }
    )


def check_folder(pruned: Config, *, resume: bool) -> None:
    """Raise RunFolderError unless a pruning with these settings may be written to its folder."""
    folder = pruned.folder
    if not run_folder.is_used(folder):
        return
    if not resume:
        raise RunFolderError(
            f"{folder}: pruned already; add --resume to continue, delete it, or keep both with prune.label=TEXT"
        )
    old, new = (flatten_data(c.prune.model_dump(mode="json")) for c in (run_folder.read_config(folder), pruned))
    changed = [f"prune.{key}: {old[key]} -> {new[key]}" for key in new if old[key] != new[key]]
    if changed:
        raise RunFolderError(
            f"{folder}: was pruned with other settings ({'; '.join(changed)}); resume with the same ones, or choose "
            "another folder with prune.label=TEXT"
        )
    if pruned.prune.method == "channels":  # its widths are known once the channels are chosen
        model = pruned.model.model_copy(update={"channels": run_folder.read_config(folder).model.channels})
        pruned = pruned.model_copy(update={"model": model})
    run_folder.check_usable(folder, pruned, resume=True)


def check_rewind(folder: Path, config: Config, steps_per_epoch: int | None = None) -> None:
    """Raise RunFolderError where the run has no checkpoint of `prune.rewind`.

    One of an epoch is checked once the steps of an epoch are known."""
    point = config.prune.rewound_to
    if point is None or point[0] == "initial" or (point[0] == "epoch" and steps_per_epoch is None):
        return
    step = point[1] * (steps_per_epoch or 1 if point[0] == "epoch" else 1)
    steps = checkpoint.list_steps(folder / run_folder.CHECKPOINTS)
    if steps and step not in steps:
        asked = "" if point[0] == "step" else f", which is step {step}"
        raise RunFolderError(
            f"prune.rewind={config.prune.rewind}{asked}: the run has checkpoints of the steps "
            f"{', '.join(map(str, steps))}; checkpoint.keep_every_steps keeps more of them"
        )


def training_length(config: Config, data: Data, runtime: Runtime) -> tuple[int, int]:
    """(steps of an epoch, steps of the whole training) of these settings. Raises ConfigError, DataError."""
    steps = build_training_order(config, data.splits).steps(runtime.rank, runtime.world_size)
    return steps, config.train.iterations or config.train.epochs * steps


def gradual_pruning(pruned: Config, initial: float, length: int) -> GradualPruning:
    """The ramp of a fine-tuning of `length` steps. Raises ConfigError where it does not end within them."""
    prune = pruned.prune
    interval = prune.interval or max(1, length // 2 // prune.steps)
    if prune.steps * interval > length:
        raise ConfigError(
            f"prune.steps={prune.steps} prunings, one every {interval} steps, end after the {length} steps of "
            "fine-tuning: the rate would not be reached; lower prune.steps or prune.interval, or raise "
            "prune.finetune.epochs"
        )
    final = max(prune.rates[0], initial)
    seed = stream(pruned.seed, "prune")
    return GradualPruning(prune.method, prune.scope, initial, final, interval, prune.steps, seed)


def starting_point(
    pruned: Config,
    model: PretrainingModel,
    found: checkpoint.Checkpoint,
    masks: Masks,
    values: Masks,
    runtime: Runtime,
    data: Data,
    gradual: GradualPruning | None,
) -> Start:
    """What a fine-tuning starts from: a copy of `model` of the checkpoint `found`, pruned. Collective.

    values: new weights of the encoder by name, those that a method has compensated.
    """
    model = copy.deepcopy(model)
    objective: dict[str, Tensor] | None = found.tensors.get("objective")
    set_weights(model, values)
    WeightMasks(model.encoder, masks)
    if pruned.prune.finetune.loss == "cross_entropy":
        model, objective = with_classifier(model, found.state, pruned, runtime, data), None
    return Start(model, objective, masks or None, gradual)


@torch.no_grad()
def set_weights(model: PretrainingModel, values: Masks) -> None:
    """Set weights of the encoder by name."""
    parameters = dict(model.encoder.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)


def rewound(
    folder: Path, config: Config, found: checkpoint.Checkpoint, steps_per_epoch: int, runtime: Runtime
) -> tuple[PretrainingModel, checkpoint.Checkpoint]:
    """The dense run's model at `prune.rewind`, and its checkpoint; for the weights before training, the checkpoint
    `found` without the state of the objective. Collective. Raises CheckpointCorrupt, RunFolderError, and what loading
    weights raises."""
    point = config.prune.rewound_to
    assert point is not None
    with propagate_errors(), undisturbed(torch.nn.Identity(), runtime.device):
        torch.manual_seed(stream(config.seed, "model"))  # as build_training draws them
        if point[0] == "initial":
            model = build_model(found.state)
            if config.model.weights is not None:
                load_pretrained(model.encoder, config.model.weights)
            tensors = {name: part for name, part in found.tensors.items() if name != "objective"}
            return model, checkpoint.Checkpoint(found.path, tensors, found.state, found.manifest)
        step = point[1] * (steps_per_epoch if point[0] == "epoch" else 1)
        early = checkpoint.load_checkpoint(path_of(folder / run_folder.CHECKPOINTS, step))
        with checkpoint.mismatch_is_corrupt(early.path):
            model = build_model(early.state)
            model.load_state_dict(early.tensors["model"])
            state = merged(model, early.state)
    return model, replace(early, state=state)
