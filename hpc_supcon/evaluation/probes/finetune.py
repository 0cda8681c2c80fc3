"""The probe `finetune`: encoder and classifier are trained together, data-parallel over the ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Batch, EvalTransform, Loader, Source
from ...distributed.collectives import all_sum, propagate_errors
from ...errors import NonFinite
from ...models import Mlp, check_deterministic
from ...pruning import WeightMasks
from ...seeding import stream
from ...training.engine import autocast, distribute, unscaled
from ..features import extract, in_chunks
from ..left_out import count_left_out
from .base import FittedProbe, ProbeOutcome, ProbeSpec, ProbeTask
from .optimization import FitPlan, FitProgress, build_optimizer, fit_plan, scale_lr
from .training import Trained, seeded
from .training_images import check_batches, endless, open_loader, preprocessing

LINEAR_HEAD: dict[str, Any] = {"name": "linear", "options": {}}


class Classifier(nn.Module):
    """An encoder and a head (see `build_head`): images [N, C, H, W] -> logits [N, classes]."""

    def __init__(self, encoder: nn.Module, classes: int, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        width: Any = encoder.feature_dim
        self.encoder, self.head = encoder, build_head(width, classes, hidden=hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def build_head(in_dim: int, classes: int, *, hidden: Sequence[int] = ()) -> nn.Module:
    """A linear layer, behind hidden layers with ReLU of these widths: [N, in_dim] -> logits [N, classes]."""
    return Mlp(in_dim, hidden, classes, batch_norm=False, dropout=0.0) if hidden else nn.Linear(in_dim, classes)


def _fit(task: ProbeTask) -> ProbeOutcome:
    """Train a copy of the run's encoder with a new head.

    Raises ConfigError for an encoder that has no deterministic training where that is asked for, NonFinite, and what
    the loader raises.
    """
    config, runtime, settings = task.config, task.runtime, task.settings
    assert task.encoder is not None
    with propagate_errors():
        encoder = task.description["encoder"]
        check_deterministic(task.encoder, config.model.encoder, encoder, runtime.device)
        loader = open_loader(task, augment=settings.augment)
        preprocess = preprocessing(task, augment=settings.augment)
    with closing(loader), seeded(stream(config.seed, "probe"), runtime.device):
        model = Classifier(copy.deepcopy(task.encoder), len(task.classes), settings.hidden).to(runtime.device)
        masks = None if task.masks is None else WeightMasks.from_packed(model.encoder, task.masks)
        parallel = distribute(model, runtime, sync_bn=config.model.sync_bn)
        torch.manual_seed(stream(config.seed, "finetune", runtime.rank))
        transform = EvalTransform(**task.description["normalization"]).to(runtime.device)
        validation = task.data.splits.validation
        trained = train_classifier(
            model,
            parallel,
            loader,
            preprocess,
            None if validation is None else partial(_evaluate, model, validation, transform, task),
            fit_plan(settings),
            encoder_lr=settings.encoder_lr,
            precision=partial(autocast, runtime.device, unscaled(config.train.precision)),
            masks=masks,
        )
    width: Any = task.encoder.feature_dim
    head = {"name": "mlp", "options": {"hidden": list(settings.hidden)}} if settings.hidden else LINEAR_HEAD
    description = task.describe(
        width,
        head,
        classes=task.classes,
        encoder=encoder,
    )
    fitted = FittedProbe(description, head=model.head, encoder=model.encoder).to(runtime.device)
    chosen = {
        "lr": trained.lr,
        "encoder_lr": settings.encoder_lr,
        "iteration": trained.iteration,
        "epoch": round(trained.epoch, 3),
    }
    return ProbeOutcome(fitted.eval(), chosen, trained.history, {"iterations": trained.iterations})


def train_classifier(
    model: Classifier,
    parallel: nn.Module,
    loader: Loader,
    preprocess: Callable[[Tensor], Tensor],
    evaluate: Callable[[], tuple[float, float]] | None,
    plan: FitPlan,
    *,
    encoder_lr: float,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    masks: WeightMasks | None = None,
) -> Trained:
    """Train `model` through `parallel`, its data-parallel wrapper, and leave it in its best state.

    preprocess: uint8 images of a batch -> what the encoder reads. evaluate: (mean loss, accuracy) on validation,
    equal on all ranks; None keeps the last state. masks: of the encoder's pruned weights, which stay zero. All ranks'
    batches have one size, so that the mean gradient over ranks is that of the global batch. Raises NonFinite on all
    ranks, before the update. Collective.
    """
    progress = FitProgress(plan, loader.steps_per_epoch)
    groups = [(model.encoder.parameters(), encoder_lr), (model.head.parameters(), plan.lrs[0])]
    optimizer = build_optimizer(groups, name=plan.optimizer, weight_decay=plan.weight_decay, decay=plan.decay)
    best_at, best = 0, _copy_state(model)
    sums = torch.zeros(3, dtype=torch.float64, device=next(model.head.parameters()).device)
    parallel.train()
    for i, batch in enumerate(islice(endless(loader), progress.total), 1):
        factor = plan.lr_factor(i - 1, progress.total)
        scale_lr(optimizer, factor)
        sums += _step(parallel, optimizer, preprocess, batch, precision, i, masks)
        if progress.due(i):
            loss, correct, n = all_sum(sums).tolist()
            numbers = {"train_loss": loss / n, "train_accuracy": correct / n}
            value = None
            if evaluate is not None:
                loss, accuracy = evaluate()
                parallel.train()
                numbers |= {"validation_loss": loss, "validation_accuracy": accuracy}
                value = loss if plan.monitor == "loss" else accuracy
            if progress.record(i, value, lr=factor * plan.lrs[0], encoder_lr=factor * encoder_lr, **numbers):
                best_at, best = i, _copy_state(model)
            sums.zero_()
            if progress.stop:
                break
    if not best_at:
        raise NonFinite("fine-tuning: the validation loss was never finite; lower probe.finetune.lr and encoder_lr")
    model.load_state_dict(best)
    return Trained(model.eval(), plan.lrs[0], best_at, best_at / loader.steps_per_epoch, i, progress.history)


def _step(
    parallel: nn.Module,
    optimizer: torch.optim.Optimizer,
    preprocess: Callable[[Tensor], Tensor],
    batch: Batch,
    precision: Callable[[], AbstractContextManager[object]],
    iteration: int,
    masks: WeightMasks | None,
) -> Tensor:
    """One update; [3]: this rank's sums of losses and of correct predictions before it, and its number of images."""
    with precision():
        logits = parallel(preprocess(batch.images))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits, batch.labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if masks is not None:
        masks.apply_to_gradients()
    norm = torch.nn.utils.get_total_norm([p.grad for p in parallel.parameters() if p.grad is not None])
    if not torch.isfinite(norm):  # of averaged gradients: equal on all ranks, so all of them raise
        raise NonFinite(f"fine-tuning, iteration {iteration}: gradients became NaN or Inf; lower probe.finetune.lr")
    optimizer.step()
    if masks is not None:
        masks.apply_to_weights()
    correct = (logits.detach().argmax(dim=1) == batch.labels).sum()
    n = correct.new_tensor(len(batch.labels))
    return torch.stack([loss.detach().double() * len(batch.labels), correct.double(), n.double()])


def _evaluate(model: Classifier, source: Source, transform: EvalTransform, task: ProbeTask) -> tuple[float, float]:
    """(mean cross-entropy, accuracy) over all ranks' shares of `source`. Collective."""
    features, labels = extract(
        model.encoder, source, transform, task.runtime, loader=task.data.loader, options=task.data.evaluation
    )
    logits = in_chunks(model.head, features)
    losses = F.cross_entropy(logits.double(), labels, reduction="sum")
    correct = (logits.argmax(dim=1) == labels).sum()
    sums = torch.stack([losses, correct.double(), correct.new_tensor(len(labels)).double()])
    count_left_out(source, labels)
    total_loss, total_correct, n = all_sum(sums).tolist()
    return total_loss / n, total_correct / n


def _copy_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


FINETUNE = ProbeSpec(check_batches, _fit, build_head)
