"""Accuracy of the encoder's features during training, measured without changing anything that training uses."""

from __future__ import annotations

import torch
from torch import nn

from ..config import Config
from ..data import EvalTransform, LoaderOptions, Source
from ..distributed.collectives import gather_rows
from ..distributed.launch import Runtime
from ..errors import ConfigError, unknown_name
from ..models import LinearHeads
from ..seeding import stream
from ..training.data import Data
from ..training.validation import OnlineProbe, undisturbed
from .features import LabeledRows, build_prepare, extract, fit_standardization
from .left_out import count_left_out
from .probes.knn import knn_accuracy
from .probes.optimization import FitPlan
from .probes.training import seeded, train_heads

KINDS = ("knn", "linear")


def monitor(
    encoder: nn.Module,
    train: Source,
    validation: Source,
    transform: EvalTransform,
    runtime: Runtime,
    *,
    kind: str = "knn",
    images: int = 10_000,
    k: int = 20,
    temperature: float = 0.1,
    lr: float = 1e-2,
    epochs: int = 10,
    batch_size: int = 1024,
    seed: int = 0,
    loader: str = "resident",
    options: LoaderOptions | None = None,
) -> dict[str, float]:
    """{"accuracy": 0..1} on validation, and "loss" for `linear`; equal on all ranks. Collective.

    encoder: the bare module, not its data-parallel wrapper. Of the training images at most `images` are used, evenly
    strided. knn: see `knn_accuracy`. linear: a linear head on standardized features, trained by AdamW with a cosine
    schedule from `lr` to 0 over `epochs`; its last state is evaluated. Afterwards the encoder's weights, statistics
    and training mode and every generator are as before, so training continues unchanged. Raises ConfigError for an
    unknown kind and for more neighbors than images, NonFinite, and what the loader raises.
    """
    if kind not in KINDS:
        raise ConfigError(unknown_name("kind of monitoring", kind, KINDS))
    n = min(images, len(train))
    if kind == "knn" and k > n:
        raise ConfigError(f"k={k} neighbors, but monitoring uses {n} training images")
    # evenly strided, because sources are often sorted by class
    subset = train if n == len(train) else train.subset(torch.arange(n) * len(train) // n)
    with undisturbed(encoder, runtime.device):
        train_rows, validation_rows = (
            extract(encoder, source, transform, runtime, loader=loader, options=options)
            for source in (subset, validation)
        )
        for source, rows in ((subset, train_rows), (validation, validation_rows)):
            count_left_out(source, rows[1])
        classes = len(train.classes)
        if kind == "knn":
            accuracy = knn_accuracy(*train_rows, *validation_rows, classes=classes, k=k, temperature=temperature)
            return {"accuracy": accuracy}
        plan = FitPlan((lr,), epochs, batch_size, "adamw", monitor="loss")
        return _linear(train_rows, validation_rows, classes, plan, seed, runtime)


def _linear(
    train_rows: LabeledRows, validation_rows: LabeledRows, classes: int, plan: FitPlan, seed: int, runtime: Runtime
) -> dict[str, float]:
    """Scores of a linear head; the rows are this rank's."""
    train, validation = ((gather_rows(x), gather_rows(labels)) for x, labels in (train_rows, validation_rows))
    width = train[0].shape[1]
    prepare = build_prepare("features", width, {}, standardize=True).to(runtime.device)
    fit_standardization(prepare, train[0])
    with seeded(seed, runtime.device):
        heads = LinearHeads(1, width, classes).to(runtime.device)
        last = train_heads(heads, prepare, train, validation, plan, seed=seed).history[-1]
    return {"accuracy": last["validation_accuracy"], "loss": last["validation_loss"]}


def online_probe(config: Config, runtime: Runtime, data: Data) -> OnlineProbe | None:
    """The probe that `validation.probe` asks for, to be called during pre-training; None where it asks for none."""
    settings, validation = config.validation.probe, data.splits.validation
    if settings.kind == "none" or validation is None:
        return None

    def accuracy(encoder: nn.Module, transform: EvalTransform) -> float:
        return monitor(
            encoder,
            data.splits.train,
            validation,
            transform,
            runtime,
            **settings.model_dump(),
            seed=stream(config.seed, "probe"),
            loader=data.loader,
            options=data.evaluation,
        )["accuracy"]

    return accuracy
