"""The objective on the validation split, measured during training without changing it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..config import Config
from ..data import EvalOrder, EvalTransform, MultiCrop, Order, Source, Splits, TrainOrder, Views, build_loader
from ..distributed.collectives import all_sum
from ..distributed.launch import Runtime
from ..errors import ConfigError, CorruptSample
from ..losses import loss_spec
from ..seeding import stream
from .build import build_views
from .data import Data
from .state import Training

Validate = Callable[[], dict[str, float]]
"""Returns {"loss", "accuracy" ...}; collective."""
OnlineProbe = Callable[[nn.Module, EvalTransform], float]
"""(encoder, transform) -> accuracy on the validation split of a probe of the current features; collective."""


def check_validation_split(config: Config, splits: Splits) -> None:
    """Raise ConfigError where the data has no validation split, or too few images, for what is asked of validation.

    The rules that need no data are in `config.check`.
    """
    if config.validation.enabled and splits.validation is None:
        asked = "train.stopping" if config.train.stopping.enabled else "validation.every_*"
        raise ConfigError(f"{asked} needs a validation split: set data.validation_fraction")
    probe = config.validation.probe
    if probe.kind == "knn" and probe.k > len(splits.train):
        raise ConfigError(f"validation.probe.k={probe.k} neighbors, but training has {len(splits.train)} images")


def build_validate(
    config: Config, data: Data, training: Training, runtime: Runtime, probe: OnlineProbe | None
) -> Validate | None:
    """The function that validates `training`, None where the configuration asks for no validation.

    The accuracy is the classifier's where the model has one, else the probe's. The averaged weights are evaluated
    where there are any. `left_out` is the number of images that do not decode, where there are any: they count in no
    mean.
    """
    validation, source = config.validation, data.splits.validation
    if source is None or (validation.every_epochs is None and validation.every_steps is None):
        return None
    state = training.state
    specs = {name: loss_spec(name) for name in config.loss.weights}
    pairwise = [name for name, spec in specs.items() if spec.pairwise]
    pointwise = [name for name, spec in specs.items() if not spec.pairwise]
    transform = EvalTransform(**training.description["normalization"]).to(runtime.device)
    views = build_views(config, training.description).to(runtime.device)
    seed = stream(config.seed, "validation", runtime.rank)
    batches = partial(_batches, data, source, runtime)
    batch_size = min(config.data.batch_size, len(source) - len(source) % runtime.world_size)

    def validate() -> dict[str, float]:
        views.reseed(seed)  # the same views in every validation, so that losses can be compared
        numbers: dict[str, float] = {}
        left_out: list[int] = []
        values: dict[str, float] = {}
        averaged = nullcontext() if state.ema is None else state.ema.applied()
        with undisturbed(state.parallel, runtime.device), averaged:
            state.parallel.eval()
            if probe is not None:
                numbers["accuracy"] = numbers[f"{validation.probe.kind}_accuracy"] = probe(
                    state.model.encoder, transform
                )
            torch.manual_seed(seed)  # triplets are drawn: the same ones in every validation
            with torch.no_grad():
                if pointwise:
                    order = EvalOrder(len(source), max(1, batch_size // runtime.world_size))
                    values, more = _pointwise_losses(training, pointwise, batches(order, 0, left_out), transform)
                    numbers |= more
                if pairwise:
                    # shuffled, because files are sorted by class; the same global batches on any number of ranks
                    shuffled = batches(TrainOrder(len(source), batch_size), config.seed, left_out)
                    values |= _pairwise_losses(training, pairwise, shuffled, views)
        loss = sum(weight * values[name] for name, weight in config.loss.weights.items())
        total = int(all_sum(torch.tensor(left_out, device=runtime.device)).max())
        return {"loss": loss, **numbers, **({"left_out": total} if total else {})}

    return validate


def _batches(
    data: Data, source: Source, runtime: Runtime, order: Order, seed: int, left_out: list[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of this rank's batches, one epoch of `order`, without those that do not decode, whose number
    `left_out` gets at the end."""
    loader = build_loader(
        data.loader,
        source,
        order,
        seed=seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
        options=data.evaluation,
    )
    missing = sum(len(index) for index in order.epoch(seed, 0, runtime.rank, runtime.world_size))
    with closing(loader):
        for batch in loader.epoch(0):
            missing -= len(batch.labels)
            yield batch.images, batch.labels
    left_out.append(missing)


def _pointwise_losses(
    training: Training, names: list[str], batches: Iterator[tuple[Tensor, Tensor]], transform: EvalTransform
) -> tuple[dict[str, float], dict[str, float]]:
    """Losses of single images, on every image without augmentation: (means by loss, accuracy or MAE and MSE)."""
    state = training.state
    sums: dict[str, Tensor] = {}
    count = 0

    def add(name: str, total: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=state.device)) + total

    for images, labels in batches:
        if not len(labels):  # none of them decodes
            continue
        x = transform(images).unsqueeze(1)  # one view
        with training.options.autocast():
            outputs = state.model(x)
        count += len(labels)
        for name in names:
            head = state.objective.specs[name].head
            add(name, state.objective.pointwise(name, outputs[head], x, labels).double() * len(labels))
        if "classifier" in outputs:
            # counted, not averaged: n (k / n) may differ from k
            add("accuracy", (outputs["classifier"].squeeze(1).argmax(1) == labels).sum())
        if "decoder" in outputs:
            error = outputs["decoder"].float() - state.objective.targets(x)
            add("mae", error.abs().mean().double() * len(labels))
            add("mse", error.square().mean().double() * len(labels))
    keys = [*names, *(["accuracy"] if "classifier" in state.objective.heads else [])]
    keys += ["mae", "mse"] if "decoder" in state.objective.heads else []
    zero = torch.zeros((), dtype=torch.float64, device=state.device)  # this rank may have no image
    message = torch.stack([*(sums.get(key, zero) for key in keys), zero + count])
    *totals, images_seen = all_sum(message).tolist()
    if not images_seen:
        raise CorruptSample("no image of the validation split decodes: `hpc-supcon verify` names them")
    means = {key: total / images_seen for key, total in zip(keys, totals, strict=True)}
    return {key: means.pop(key) for key in names}, means


def _pairwise_losses(
    training: Training, names: list[str], batches: Iterator[tuple[Tensor, Tensor]], views: Views | MultiCrop
) -> dict[str, float]:
    """Losses that compare images: means over global batches of random views, without the incomplete last batch."""
    state = training.state
    sums, steps = dict.fromkeys(names, 0.0), 0
    for images, labels in batches:
        x = views(images)
        with training.options.autocast():
            outputs = state.model(x) | state.objective.momentum_outputs(state.model, x)
        for name in names:
            sums[name] += float(state.objective.pairwise(name, outputs, labels))
        steps += 1
    return {name: total / steps for name, total in sums.items()}


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores at the end what an evaluation inside may change: the training mode of each submodule of `module`, and
    the random generators of Python, NumPy and PyTorch (on the CPU and on `device`)."""
    modes = [(part, part.training) for part in module.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for part, training in modes:
            part.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)
