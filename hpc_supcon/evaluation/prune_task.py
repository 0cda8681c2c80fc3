"""What pruning methods ask about a run's encoder: gradients on train, and the scan of the loss on validation."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..config import Config, digest
from ..data import Batch
from ..distributed.collectives import gather_objects
from ..distributed.launch import Runtime
from ..errors import ConfigError, RunFolderError
from ..files import write_atomically
from ..losses import loss_spec
from ..models import PretrainingModel
from ..pruning import (
    CHANNEL_SCORES,
    PRUNERS,
    InverseFisher,
    PrunerSpec,
    PruneTask,
    Sensitivity,
    prunable,
    scan_layers,
)
from ..seeding import stream
from ..terminal import note, only_told
from ..training.build import Start, build_training
from ..training.data import Data
from ..training.engine import unscaled
from ..training.objective import needs_target
from ..training.state import Training
from ..training.validation import build_validate, undisturbed
from .classifier import with_classifier, with_cross_entropy
from .fisher_task import fisher_task
from .prune_figures import draw_sensitivity

FOLDER = "sensitivity"


def spec_of(config: Config) -> PrunerSpec:
    """Of `prune.method`: what it needs, and its scores of weights."""
    prune = config.prune
    return CHANNEL_SCORES[prune.channels.score] if prune.method == "channels" else PRUNERS[prune.method]


def check_data(config: Config, data: Data) -> None:
    """Raise ConfigError where the data have no validation split, and the method scans it."""
    if spec_of(config).needs == "scan" and data.splits.validation is None:
        raise ConfigError(
            f"prune.method={config.prune.method} scans the loss on the validation split: set data.validation_fraction"
        )


@contextmanager
def prune_task(
    folder: Path,
    config: Config,
    runtime: Runtime,
    data: Data,
    model: PretrainingModel,
    found: checkpoint.Checkpoint,
    learned: InverseFisher | None = None,
) -> Iterator[PruneTask]:
    """What `prune.method` is told about `model`, of the checkpoint `found` of a run. Collective.

    The task has a copy of the encoder. folder: the run folder, which keeps scans and what was learned. learned: by
    the method in the round of pruning before.
    """
    needs, seed = spec_of(config).needs, stream(config.seed, "prune")
    if needs == "weights":
        yield PruneTask(prunable(model.encoder), seed)
        return
    training, own = _measuring(config, runtime, data, copy.deepcopy(model), found)
    with closing(training.loader):
        weights = prunable(training.state.model.encoder)
        batches = _Batches(training, config.seed, runtime.rank)
        if needs == "fisher":
            training.state.parallel.eval()
            fisher = fisher_task(folder / FOLDER, own, runtime, data, training, batches, found, learned)
            yield PruneTask(weights, seed, fisher=fisher)
        elif needs == "gradients":
            training.state.parallel.eval()
            gradients = _Gradients(training, batches, config.seed, runtime.rank)
            n_batches = config.prune.channels.batches
            yield PruneTask(weights, seed, training.state.model, batches, gradients, n_batches=n_batches)
        else:
            yield PruneTask(weights, seed, scan=partial(_scan, folder, own, runtime, data, training, found))


def _measuring(
    config: Config, runtime: Runtime, data: Data, model: PretrainingModel, found: checkpoint.Checkpoint
) -> tuple[Training, Config]:
    """A training that is never run, whose model and objective (`prune.loss`) are measured, and its settings."""
    objective: dict[str, Tensor] | None = found.tensors.get("objective")
    if config.prune.loss == "cross_entropy":
        model, objective = with_classifier(model, found.state, config, runtime, data), None
        config = with_cross_entropy(config)
    contrastive = any(loss_spec(name).contrastive for name in config.loss.weights)
    train: dict[str, Any] = {"engine": "ddp", "ema": None, "compile": False, "cuda_graphs": False}
    train |= {"precision": unscaled(config.train.precision), "activation_checkpointing": False}
    changes: dict[str, Any] = {
        "train": config.train.model_copy(update=train),
        # of two sizes of views, the global ones: images of this size are what the encoder is used on
        "data": config.data.model_copy(update={"views": config.data.crops[0]}),
        # the queue of a contrastive loss is left out; that of another one is in its state
        "loss": config.loss.model_copy(update={"queue_size": 0} if contrastive else {}),
        # the momentum is that of a target, or of a queue, which is left out
        "model": config.model.trained_whole.model_copy(
            update={"weights": None}
            if needs_target(config.loss.weights)
            else {"momentum_encoder": None, "weights": None}
        ),
        "validation": config.validation.model_copy(update={"every_steps": 1}),
    }
    measured = config.model_copy(update=changes)
    return build_training(measured, data, runtime, start=Start(model, objective)), measured


class _Batches:
    """PruneTask.batches: of the run's order and random views."""

    def __init__(self, training: Training, seed: int, rank: int) -> None:
        self._training, self._seed, self._rank = training, seed, rank
        self._next = 0  # the batch that the iterator gives next
        self._iterator: Iterator[Batch] = iter(())

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        batch = next(self._iterator, None) if index == self._next else None
        if batch is None:  # another index, or a new epoch
            epoch, start = divmod(index, self._training.plan.steps_per_epoch)
            self._iterator = iter(self._training.loader.epoch(epoch, start))
            batch = next(self._iterator)
        self._next = index + 1
        state = self._training.state
        with undisturbed(state.parallel, state.device):
            torch.manual_seed(stream(self._seed, "prune", self._rank, index))
            state.views.reseed(stream(self._seed, "prune", self._rank, index))
            return state.views(batch.images), batch.labels


class _Gradients:
    """PruneTask.gradients: with BatchNorm's running statistics and no dropout."""

    def __init__(self, training: Training, batches: _Batches, seed: int, rank: int) -> None:
        self._training, self._batches, self._seed, self._rank = training, batches, seed, rank
        self._drawn = 0

    def __call__(self, n: int) -> Iterator[dict[str, Tensor]]:
        for _ in range(n):
            index, self._drawn = self._drawn, self._drawn + 1
            yield self._of(index)

    def _of(self, index: int) -> dict[str, Tensor]:
        state, options = self._training.state, self._training.options
        views, labels = self._batches(index)
        with undisturbed(state.parallel, state.device):
            torch.manual_seed(stream(self._seed, "prune", self._rank, index))  # random triplets
            with options.autocast():
                outputs = state.engine.forward(views)
            state.engine.backward(state.objective(outputs, views, labels, None, options.images_per_rank))
        gradients = {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone()
            for name, weight in prunable(state.model.encoder).items()
        }
        state.parallel.zero_grad(set_to_none=True)
        return gradients


def _scan(
    folder: Path,
    config: Config,
    runtime: Runtime,
    data: Data,
    training: Training,
    found: checkpoint.Checkpoint,
) -> Sensitivity:
    """The scan of `prune.scan`, and its heat map; what an earlier one has measured is read. Collective."""
    source, settings = data.splits.validation, config.prune
    assert source is not None
    images = min(settings.scan.images or len(source), len(source))
    # evenly strided, because sources are often sorted by class
    chosen = source if images == len(source) else source.subset(torch.arange(images) * len(source) // images)
    validate = build_validate(
        config, replace(data, splits=replace(data.splits, validation=chosen)), training, runtime, None
    )
    assert validate is not None
    weights = prunable(training.state.model.encoder)
    facts: dict[str, Any] = {
        "checkpoint": found.name,
        "loss": config.loss.label,
        "images": images,
        "weights": {name: weight.numel() for name, weight in weights.items()},
        "digest": _digest(config, data, found, images),
    }
    path = folder / FOLDER / f"{settings.loss}-{facts['digest'][:12]}.json"
    cells: dict[str, float | None] = gather_objects(_read(path, facts) if runtime.is_main else {})[0]

    def write(cell: str) -> None:
        if runtime.is_main:
            with only_told():
                _write(path, {**facts, "cells": cells})

    if runtime.is_main:
        total = len(weights) * len(settings.scan.rates)
        note(f"{path}: scanning {len(weights)} layers at {len(settings.scan.rates)} rates on {images:,} images")
        if cells:
            note(f"{path}: has {len(cells) - 1:,} of {total:,} losses already")
    scan = scan_layers(weights, settings.scan.rates, lambda: gather_objects(validate()["loss"])[0], cells, write)
    if runtime.is_main:
        with only_told():
            draw_sensitivity(path.with_suffix(".png"), scan, facts["loss"], facts["weights"])
    return scan


def _digest(config: Config, data: Data, found: checkpoint.Checkpoint, images: int) -> str:
    """Of everything that decides a loss of the scan, but for the layer and its rate."""
    facts: list[Any] = [found.manifest["files"], digest(config), data.fingerprint.as_json(), images]
    if config.prune.loss == "cross_entropy":
        facts.append(config.probe.linear.model_dump(mode="json"))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(path: Path, facts: dict[str, Any]) -> dict[str, float | None]:
    """The losses of an earlier scan; none where there is no such file, or it is not whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["digest"] == facts["digest"]:
            return {str(cell): None if loss is None else float(loss) for cell, loss in found["cells"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # it is measured again
    return {}


def _write(path: Path, scan: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(scan, indent=1) + "\n", durable=False)
    except OSError as error:
        raise RunFolderError(f"{path}: not written: {error.strerror}") from None
