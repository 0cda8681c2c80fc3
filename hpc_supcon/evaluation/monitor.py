"""How good the encoder is by now, asked in the middle of training without changing it."""

from __future__ import annotations

import torch
from torch import nn

from ..config import Config
from ..data import EvalTransform, LoaderOptions, Source
from ..distributed.collectives import gather_rows
from ..distributed.launch import Runtime
from ..errors import ConfigError, unknown_name
from ..models import LinearHeads
from ..training.data import Data
from ..training.validation import OnlineProbe, undisturbed
from .features import Part, build_prepare, extract, fit_standardization
from .knn import knn_accuracy
from .probes.training import seeded, train_heads
from .probes.watch import Plan

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
    """{"accuracy": 0..1} on validation, equal on all ranks, and "loss" for `linear`. Collective.

    encoder: the bare module, not its data-parallel wrapper. At most `images` training images, evenly strided,
    stand for all. knn: see `knn_accuracy`. linear: a linear head on standardized features, AdamW from `lr` by a
    cosine to 0 over `epochs`; its last state is measured. The encoder is as it was afterwards: weights, statistics,
    training mode and every generator, so that training goes on as if nobody had asked. Raises ConfigError for an
    unknown kind and for more neighbors than images, NonFinite, and what the loader raises.
    """
    if kind not in KINDS:
        raise ConfigError(unknown_name("kind of monitoring", kind, KINDS))
    n = min(images, len(train))
    if kind == "knn" and k > n:
        raise ConfigError(f"k={k} neighbors, but monitoring uses {n} training images")
    # every n-th image of the whole: sources are often sorted by class
    bank = train if n == len(train) else train.subset(torch.arange(n) * len(train) // n)
    with undisturbed(encoder, runtime.device):
        known, asked = (
            extract(encoder, source, transform, runtime, loader=loader, options=options)
            for source in (bank, validation)
        )
        classes = len(train.classes)
        if kind == "knn":
            return {"accuracy": knn_accuracy(*known, *asked, classes=classes, k=k, temperature=temperature)}
        plan = Plan((lr,), epochs, batch_size, "adamw", monitor="loss")
        return _linear(known, asked, classes, plan, seed, runtime)


def _linear(known: Part, asked: Part, classes: int, plan: Plan, seed: int, runtime: Runtime) -> dict[str, float]:
    train, validation = ((gather_rows(x), gather_rows(labels)) for x, labels in (known, asked))
    width = train[0].shape[1]
    prepare = build_prepare("features", width, {}, standardize=True).to(runtime.device)
    fit_standardization(prepare, train[0])
    with seeded(seed, runtime.device):
        heads = LinearHeads(1, width, classes).to(runtime.device)
        last = train_heads(heads, prepare, train, validation, plan, seed=seed).history[-1]
    return {"accuracy": last["validation_accuracy"], "loss": last["validation_loss"]}


def online_probe(config: Config, runtime: Runtime, data: Data) -> OnlineProbe | None:
    """`validation.probe` of a configuration, to be asked during pre-training; None where it is not asked for."""
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
            seed=config.seed,
            loader=data.loader,
            options=data.evaluation,
        )["accuracy"]

    return accuracy
