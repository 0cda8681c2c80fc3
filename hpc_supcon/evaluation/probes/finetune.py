"""The probe that trains encoder and classifier together, spread over the ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Batch, EvalTransform, Loader, LoaderOptions, Source, TrainOrder, build_loader
from ...distributed.collectives import all_sum, propagate_errors
from ...errors import NonFinite
from ...pruning import WeightMasks
from ...training import assemble
from ...training.engine import autocast, distribute, unscaled
from ..features import extract, in_chunks
from ..fitted_probe import FittedProbe
from .base import Outcome, Task
from .heads import plan_of
from .training import Trained, seeded
from .watch import Plan, Watch, build_stepper, set_share


class Classifier(nn.Module):
    """An encoder and a linear head: images [N, C, H, W] -> logits [N, classes]."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        width: Any = encoder.feature_dim
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def fit_finetune(kind: str, task: Task) -> Outcome:
    """Train a copy of the run's encoder with a new head. Collective. Raises NonFinite, and what the loader raises."""
    config, runtime, settings = task.config, task.runtime, task.config.probe.finetune
    assert task.encoder is not None
    with propagate_errors():
        loader = _training_loader(task)
        render = _views(task)
    with closing(loader), seeded(config.seed, runtime.device):
        model = Classifier(copy.deepcopy(task.encoder), len(task.classes)).to(runtime.device)
        masks = None if task.masks is None else WeightMasks.unpacked(model.encoder, task.masks)
        parallel = distribute(model, runtime, sync_bn=config.model.sync_bn)
        torch.manual_seed(int(np.random.SeedSequence([config.seed, 2, runtime.rank]).generate_state(1)[0]))
        transform = EvalTransform(**task.description["normalization"]).to(runtime.device)
        validation = task.data.splits.validation
        trained = train_classifier(
            model,
            parallel,
            loader,
            render,
            None if validation is None else partial(_evaluate, model, validation, transform, task),
            plan_of(settings),
            encoder_lr=settings.encoder_lr,
            precision=partial(autocast, runtime.device, unscaled(config.train.precision)),
            masks=masks,
        )
    description = {
        "kind": kind,
        "input": "images",
        "classes": list(task.classes),
        "normalization": task.description["normalization"],
        "standardize": False,
        "in_dim": model.head.in_features,
        "encoder": task.description["encoder"],
        "head": {"name": "linear", "options": {}},
    }
    fitted = FittedProbe(description, head=model.head, encoder=model.encoder).to(runtime.device)
    chosen = {
        "lr": trained.lr,
        "encoder_lr": settings.encoder_lr,
        "iteration": trained.iteration,
        "epoch": round(trained.epoch, 3),
    }
    return Outcome(fitted.eval(), chosen, trained.history, {"iterations": trained.iterations})


def train_classifier(
    model: Classifier,
    parallel: nn.Module,
    loader: Loader,
    render: Callable[[Tensor], Tensor],
    evaluate: Callable[[], tuple[float, float]] | None,
    plan: Plan,
    *,
    encoder_lr: float,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    masks: WeightMasks | None = None,
) -> Trained:
    """Train `model` through `parallel`, its data-parallel wrapper, and leave it in its best state.

    render: uint8 images of a batch -> what the encoder reads. evaluate: (mean loss, accuracy) on validation, equal
    on all ranks; None keeps the last state. masks: of the encoder's pruned weights, which stay zero. The ranks'
    batches are of one size, so that the mean gradient over ranks is that of the global batch. Raises NonFinite
    before the update, on all ranks. Collective.
    """
    watch = Watch(plan, loader.steps_per_epoch)
    rates = [(model.encoder.parameters(), encoder_lr), (model.head.parameters(), plan.lrs[0])]
    stepper = build_stepper(rates, optimizer=plan.optimizer, weight_decay=plan.weight_decay)
    at, kept = 0, _copy(model)
    sums = torch.zeros(3, dtype=torch.float64, device=model.head.weight.device)
    parallel.train()
    for i, batch in enumerate(islice(_endless(loader), watch.total), 1):
        share = plan.lr_at(i - 1, watch.total)
        set_share(stepper, share)
        sums += _step(parallel, stepper, render, batch, precision, i, masks)
        if watch.due(i):
            loss, right, n = all_sum(sums).tolist()
            numbers = {"train_loss": loss / n, "train_accuracy": right / n}
            value = None
            if evaluate is not None:
                loss, accuracy = evaluate()
                parallel.train()
                numbers |= {"validation_loss": loss, "validation_accuracy": accuracy}
                value = loss if plan.monitor == "loss" else accuracy
            if watch.note(i, value, lr=share * plan.lrs[0], encoder_lr=share * encoder_lr, **numbers):
                at, kept = i, _copy(model)
            sums.zero_()
            if watch.stop:
                break
    if not at:
        raise NonFinite("fine-tuning: the validation loss was never finite; lower probe.finetune.lr and encoder_lr")
    model.load_state_dict(kept)
    return Trained(model.eval(), plan.lrs[0], at, at / loader.steps_per_epoch, i, watch.history)


def _step(
    parallel: nn.Module,
    stepper: torch.optim.Optimizer,
    render: Callable[[Tensor], Tensor],
    batch: Batch,
    precision: Callable[[], AbstractContextManager[object]],
    iteration: int,
    masks: WeightMasks | None,
) -> Tensor:
    """One update; this rank's sums of loss and right answers before it, and its number of images."""
    with precision():
        logits = parallel(render(batch.images))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits, batch.labels)
    stepper.zero_grad(set_to_none=True)
    loss.backward()
    if masks is not None:
        masks.apply_to_gradients()
    norm = torch.nn.utils.get_total_norm([p.grad for p in parallel.parameters() if p.grad is not None])
    if not torch.isfinite(norm):  # of averaged gradients: equal on all ranks, so all of them leave
        raise NonFinite(f"fine-tuning, iteration {iteration}: gradients became NaN or Inf; lower probe.finetune.lr")
    stepper.step()
    if masks is not None:
        masks.apply_to_weights()
    right = (logits.detach().argmax(dim=1) == batch.labels).sum()
    n = right.new_tensor(len(batch.labels))
    return torch.stack([loss.detach().double() * len(batch.labels), right.double(), n.double()])


def _evaluate(model: Classifier, source: Source, transform: EvalTransform, task: Task) -> tuple[float, float]:
    """(mean cross-entropy, accuracy) over all ranks' shares of `source`. Collective."""
    features, labels = extract(
        model.encoder, source, transform, task.runtime, loader=task.data.loader, options=task.data.evaluation
    )
    logits = in_chunks(model.head, features)
    losses = F.cross_entropy(logits.double(), labels, reduction="sum")
    right = (logits.argmax(dim=1) == labels).sum()
    loss, correct, n = all_sum(torch.stack([losses, right.double(), right.new_tensor(len(labels)).double()])).tolist()
    return loss / n, correct / n


def _training_loader(task: Task) -> Loader:
    data, settings, runtime = task.data, task.config.probe.finetune, task.runtime
    return build_loader(
        data.loader,
        data.splits.train,
        TrainOrder(len(data.splits.train), settings.batch_size),
        seed=task.config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
        options=_one_view(data.training) if settings.augment else data.evaluation,
    )


def _one_view(options: LoaderOptions) -> LoaderOptions:
    return options if options.crop is None else replace(options, crop=replace(options.crop, views=1))


def _views(task: Task) -> Callable[[Tensor], Tensor]:
    """uint8 images of a batch -> one normalized view of each."""
    config = task.config
    if not config.probe.finetune.augment:
        return EvalTransform(**task.description["normalization"]).to(task.runtime.device)
    one = config.model_copy(update={"data": config.data.model_copy(update={"views": 1})})
    views = assemble.build_views(one, dict(task.description), task.runtime).to(task.runtime.device)
    return lambda images: views(images).flatten(0, 1)


def _endless(loader: Loader) -> Iterator[Batch]:
    for epoch in count():
        yield from loader.epoch(epoch)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
