"""The probes that train a head on all rows: `linear`, `softmax` and `mlp`, and what they share with `logistic`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from torch import nn

from ...data import Splits
from ...distributed.collectives import propagate_errors
from ...errors import ConfigError, CorruptSample
from ...models import Heads, LinearHeads, Mlp, SingleHead
from ...seeding import stream
from ..features import fit_standardization, select_classes
from .base import FittedProbe, ProbeOutcome, ProbeSpec, ProbeTask
from .optimization import check_fit, fit_plan, steps_per_epoch
from .training import Trained, seeded, train_heads, train_on_batches
from .training_images import check_batches, features_of_views, open_loader


def fit_head(
    task: ProbeTask,
    head: dict[str, Any],
    build_heads: Callable[[int, int], Heads],
    *,
    labels: Sequence[int] | None = None,
) -> ProbeOutcome:
    """Train heads on all training rows, the same on every rank. Collective. Raises NonFinite.

    head: see ProbeTask.describe. build_heads(in_dim, classes): one head for each learning rate. labels: of the
    classes to tell apart, which become 0, 1, ... in this order; None: all classes.
    """
    if task.settings.input == "images":
        return _fit_on_views(task, head, build_heads)
    settings, device, seed = task.settings, task.runtime.device, stream(task.config.seed, "probe")
    train, validation = task.rows.gathered("train", task.input), task.rows.gathered("validation", task.input)
    assert train is not None
    classes = task.classes
    if labels is not None:
        classes = tuple(classes[label] for label in labels)
        train = select_classes(train, labels)
        validation = None if validation is None else select_classes(validation, labels)
        if not all(len(rows[0]) for rows in (train, validation) if rows is not None):
            raise CorruptSample(f"of the classes {' and '.join(classes)}, no training or validation image decodes")
    in_dim = train[0][0].numel()
    description = task.describe(in_dim, head, classes=classes, standardize=settings.standardize)
    with seeded(seed, device):
        fitted = FittedProbe(description, head=nn.Identity()).to(device)
        if settings.standardize:
            fit_standardization(fitted.prepare, train[0])
        heads: Any = build_heads(in_dim, len(classes))
        trained = train_heads(heads.to(device), fitted.prepare, train, validation, fit_plan(settings), seed=seed)
    return _outcome(fitted, trained, {})


def _fit_on_views(task: ProbeTask, head: dict[str, Any], build_heads: Callable[[int, int], Heads]) -> ProbeOutcome:
    """As `fit_head`, on the features of new random views of the images in every epoch (see features_of_views)."""
    settings, device = task.settings, task.runtime.device
    assert task.encoder is not None
    width: Any = task.encoder.feature_dim
    with propagate_errors():
        loader = open_loader(task, augment=True)
    validation = task.rows.gathered("validation", task.input)
    with closing(loader), seeded(stream(task.config.seed, "probe"), device):
        fitted = FittedProbe(task.describe(width, head, classes=task.classes), head=nn.Identity()).to(device)
        heads: Any = build_heads(width, len(task.classes))
        rows = features_of_views(task, loader)
        trained = train_on_batches(heads.to(device), rows, loader.steps_per_epoch, validation, fit_plan(settings))
    return _outcome(fitted, trained, {"trained_on": "images"})


def _outcome(fitted: FittedProbe, trained: Trained, facts: dict[str, Any]) -> ProbeOutcome:
    fitted.head = trained.head
    chosen = {"lr": trained.lr, "iteration": trained.iteration, "epoch": round(trained.epoch, 3)}
    return ProbeOutcome(fitted.eval(), chosen, trained.history, {"iterations": trained.iterations, **facts})


def _check_linear(section: str, settings: Any, splits: Splits) -> None:
    lrs = fit_plan(settings).lrs
    if splits.validation is None and len(lrs) > 1:
        raise ConfigError(
            f"{section}.lrs has {len(lrs)} learning rates but there is no validation split to choose on: "
            "give one rate, or set data.validation_fraction"
        )
    _check_rows(section, settings, splits)


def _check_rows(section: str, settings: Any, splits: Splits) -> None:
    if settings.input == "images":
        check_batches(section, settings, splits)
    else:
        check_fit(section, settings, splits, steps_per_epoch(len(splits.train), settings.batch_size))


def _fit_linear(task: ProbeTask) -> ProbeOutcome:
    rates = len(fit_plan(task.settings).lrs)
    return fit_head(
        task, {"name": "linear", "options": {}}, lambda in_dim, classes: LinearHeads(rates, in_dim, classes)
    )


def _check_mlp(section: str, settings: Any, splits: Splits) -> None:
    _check_rows(section, settings, splits)
    if settings.batch_norm and min(settings.batch_size, len(splits.train)) < 2:
        raise ConfigError(f"{section}.batch_norm needs at least two images per step; raise {section}.batch_size")


def _mlp(in_dim: int, classes: int, **options: Any) -> Mlp:
    return Mlp(in_dim, classes=classes, **options)


def _fit_mlp(task: ProbeTask) -> ProbeOutcome:
    options = task.settings.model_dump(mode="json", include={"hidden", "batch_norm", "dropout"})
    return fit_head(
        task,
        {"name": "mlp", "options": options},
        lambda in_dim, classes: SingleHead(_mlp(in_dim, classes, **options)),
    )


LINEAR = ProbeSpec(_check_linear, _fit_linear, nn.Linear)
SOFTMAX = ProbeSpec(_check_linear, _fit_linear, nn.Linear)
MLP = ProbeSpec(_check_mlp, _fit_mlp, _mlp)
