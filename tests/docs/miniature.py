"""Training in miniature: what a command of the documentation is reduced to, once it is read as it is printed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from hpc_supcon.config import load
from hpc_supcon.config.load import validated

FOLDER = "MINIATURE_FOLDER"
"""The variable with an image folder, read in place of CIFAR's published files: they are known by their md5."""

SMALL_ENCODERS = ("conv", "resnet9_small")
LIMITS = {
    "data.train_images": 16, "data.batch_size": 8, "data.workers": 1, "data.image_size": 20,
    "optim.warmup_epochs": 0, "optim.warmup_iterations": 0,
    "model.projection_hidden": 32, "model.projection_dim": 16, "model.predictor_hidden": 16,
    "loss.queue_size": 20, "loss.queue_start_epoch": 0, "loss.prototypes": 20, "loss.teacher_warmup_epochs": 1,
    "train.epochs": 1, "train.iterations": 2, "train.profile": 2,
    "probe.linear.epochs": 1, "probe.mlp.epochs": 1, "probe.finetune.epochs": 1, "probe.softmax.iterations": 2,
    "probe.logistic.iterations": 2, "probe.mlp.iterations": 2, "probe.linear.iterations": 2,
    "probe.finetune.iterations": 2, "probe.softmax.evaluate_every": 1, "probe.logistic.evaluate_every": 1,
    "probe.linear.evaluate_every": 1, "probe.mlp.evaluate_every": 1, "probe.finetune.evaluate_every": 1,
    "probe.linear.batch_size": 8, "probe.mlp.batch_size": 8, "probe.finetune.batch_size": 8,
    "probe.softmax.batch_size": 8, "probe.logistic.batch_size": 8, "probe.knn.k": 3, "validation.probe.k": 3,
    "prune.steps": 2, "prune.interval": 1, "prune.finetune.epochs": 1, "prune.latency.seconds": 0.01,
    "prune.fisher.steps": 2, "prune.fisher.samples": 16, "prune.fisher.batches": 2, "prune.scan.images": 20,
    "report.points": 40, "report.perplexity": 5.0, "report.queries": 2, "report.neighbors": 3,
}  # fmt: skip
"""Setting -> the largest value that is used."""
GIVEN = {"prune.latency.batch_sizes": [1], "prune.scan.rates": [0.4, 0.99], "runtime.threads": 1}
"""Settings with this value alone. (A second thread only waits for the first where others use the machine.)"""
OFF = ("report.embeddings", "probe.embedding")
"""What is left out unless the command names it."""
UNLIMITED_WHERE_NULL = ("data.train_images",)


def install() -> None:
    """In this process, reduce every configuration that is loaded from now on."""
    as_printed = load.resolve

    def resolve(recipe: str | Path = "default", overrides: Any = ()) -> tuple[dict[str, Any], dict[str, str]]:
        settings, origins = as_printed(recipe, overrides)
        validated(json.dumps(settings), origins, str(recipe))
        _reduce(settings, origins)
        return settings, origins

    load.resolve = resolve
    Figure.savefig = _savefig
    Figure.set_layout_engine = lambda *arguments, **more: None


def _savefig(figure: Figure, path: Any, **_: Any) -> None:
    """A picture of one pixel: drawing takes longer than a training in miniature."""
    kind = getattr(path, "name", str(path)).rpartition(".")[2]
    if kind == "svg":
        Path(path).write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    else:
        Image.new("RGB", (1, 1)).save(path, format="png")


def _reduce(settings: dict[str, Any], origins: Mapping[str, str]) -> None:
    for key, limit in LIMITS.items():
        section, name = _place(settings, key)
        value = section[name]
        if value is None and key in UNLIMITED_WHERE_NULL:
            section[name] = limit
        elif value is not None:
            section[name] = min(value, limit)
    data, model = settings["data"], settings["model"]
    if data["source"] in ("cifar10", "cifar100"):
        data |= {"source": "image_folder", "root": os.environ[FOLDER]}
    for key, value in GIVEN.items():
        section, name = _place(settings, key)
        section[name] = value
    for key in OFF:
        section, name = _place(settings, key)
        section[name] = section[name] and key in origins
    if settings["optim"]["schedule"] == "one_cycle":
        settings["optim"]["warmup_epochs"] = settings["train"]["epochs"] * 0.5
    if model["encoder"] not in SMALL_ENCODERS and ":" not in model["encoder"]:
        model |= {"encoder": "resnet9_small", "stem": "auto", "out_dim": None}


def _place(settings: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    *sections, name = key.split(".")
    for section in sections:
        settings = settings[section]
    return settings, name
