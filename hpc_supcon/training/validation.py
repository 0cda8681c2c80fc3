"""The objective on the validation split, during training: nothing that training draws or counts is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from ..config import Config
from ..data import EvalOrder, EvalTransform, Order, Splits, TrainOrder, Views, build_loader
from ..distributed.collectives import all_sum
from ..distributed.launch import Runtime
from ..errors import ConfigError
from ..losses import LOSSES
from .assemble import Data
from .state import TrainState

VIEWS_STREAM = 2
"""Random stream of the validation views; training's is another."""

Validate = Callable[[TrainState], dict[str, float]]
OnlineProbe = Callable[[nn.Module, EvalTransform], float]
"""(encoder, transform) -> accuracy on validation of a probe of the features as they are; collective."""


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
    config: Config, data: Data, views: Views, transform: EvalTransform, runtime: Runtime, probe: OnlineProbe | None
) -> Validate | None:
    """`validate(state)` -> {"loss", "accuracy" ...}; None where it is not asked for.

    `views` are the validation's own. The accuracy is the classifier's where the model has one, else `probe`'s.
    """
    look, source = config.validation, data.splits.validation
    if source is None or (look.every_epochs is None and look.every_steps is None):
        return None
    pairwise = [name for name in config.loss.weights if LOSSES[name].pairwise]
    pointwise = [name for name in config.loss.weights if not LOSSES[name].pairwise]
    serve = partial(
        build_loader,
        data.loader,
        source,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
        options=data.evaluation,
    )
    whole = len(source) - len(source) % runtime.world_size
    batch_size = min(config.data.batch_size, whole)

    def batches(order: Order, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        with closing(serve(order, seed=seed)) as loader:
            for batch in loader.epoch(0):
                yield batch.images, batch.labels

    first = views.state()

    def validate(state: TrainState) -> dict[str, float]:
        views.load_state(first)  # the same views at every evaluation: losses compare
        with _undisturbed(state):
            numbers: dict[str, float] = {}
            if probe is not None:
                numbers["accuracy"] = numbers[f"{look.probe.kind}_accuracy"] = probe(state.model.encoder, transform)
            values: dict[str, float] = {}
            if pointwise:
                order = EvalOrder(len(source), max(1, batch_size // runtime.world_size))
                values, more = _pointwise_terms(state, pointwise, batches(order, 0), transform)
                numbers |= more
            if pairwise:
                # shuffled, for files are sorted by class; the same global batches on any number of ranks
                values |= _pairwise_terms(
                    state, pairwise, batches(TrainOrder(len(source), batch_size), config.seed), views
                )
        loss = sum(weight * values[name] for name, weight in config.loss.weights.items())
        return {"loss": loss, **numbers}

    return validate


def _pointwise_terms(
    state: TrainState, names: list[str], batches: Iterator[tuple[Tensor, Tensor]], transform: EvalTransform
) -> tuple[dict[str, float], dict[str, float]]:
    """Losses of one image at a time, on every image as it is: (means by loss, accuracy or MAE and MSE)."""
    sums: dict[str, Tensor] = {}
    count = 0

    def add(name: str, mean: Tensor, n: int) -> None:
        sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=state.device)) + mean.double() * n

    for images, labels in batches:
        x = transform(images).unsqueeze(1)  # one view
        with state.autocast():
            outputs = state.model(x)
        count += len(labels)
        for name in names:
            head = state.objective.specs[name].head
            add(name, state.objective.pointwise(name, outputs[head], x, labels), len(labels))
        if "classifier" in outputs:
            right = outputs["classifier"].squeeze(1).argmax(1) == labels
            add("accuracy", right.double().mean(), len(labels))
        if "decoder" in outputs:
            error = outputs["decoder"].float() - state.objective.targets(x)
            add("mae", error.abs().mean(), len(labels))
            add("mse", error.square().mean(), len(labels))
    keys = [*names, *(["accuracy"] if "classifier" in state.objective.heads else [])]
    keys += ["mae", "mse"] if "decoder" in state.objective.heads else []
    zero = torch.zeros((), dtype=torch.float64, device=state.device)  # a rank may have had no image
    message = torch.stack([*(sums.get(key, zero) for key in keys), zero + count])
    *totals, images_seen = all_sum(message).tolist()
    means = {key: total / images_seen for key, total in zip(keys, totals, strict=True)}
    return {key: means.pop(key) for key in names}, means


def _pairwise_terms(
    state: TrainState, names: list[str], batches: Iterator[tuple[Tensor, Tensor]], views: Views
) -> dict[str, float]:
    """Losses that compare images: means over global batches of random views; the incomplete last one is left out."""
    sums, steps = dict.fromkeys(names, 0.0), 0
    for images, labels in batches:
        x = views(images)
        with state.autocast():
            outputs = state.model(x)
        for name in names:
            output = outputs[state.objective.specs[name].head]
            sums[name] += float(state.objective.pairwise(name, output, labels))
        steps += 1
    return {name: total / steps for name, total in sums.items()}


@contextmanager
def _undisturbed(state: TrainState) -> Iterator[None]:
    """Evaluation mode without gradients, with the averaged weights where there are any.

    Afterwards modes, weights and global generators are as they were.
    """
    was = state.parallel.training
    devices = [state.device] if state.device.type == "cuda" else []
    averaged = nullcontext() if state.ema is None else state.ema.applied()
    with torch.random.fork_rng(devices), torch.no_grad(), averaged:
        torch.manual_seed(0)  # triplets are drawn: the same at every evaluation
        state.parallel.eval()
        try:
            yield
        finally:
            state.parallel.train(was)
