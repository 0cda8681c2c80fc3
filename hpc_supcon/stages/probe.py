"""Stage `probe`: a run folder's encoder, or the pixels alone, to results.json."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import run_folder
from ..config import Config, digest
from ..data import EvalTransform, Source, normalization_of
from ..distributed.collectives import propagate_errors
from ..distributed.launch import Runtime
from ..evaluation.checks import check_probe, needs_encoder
from ..evaluation.encoder import check_classes, load_model
from ..evaluation.features import Inputs, Part, extract, in_chunks, read_images
from ..evaluation.fitted_probe import FOLDER, FittedProbe, save_probe
from ..evaluation.plots import draw_probe_curves
from ..evaluation.probes import PROBES, Outcome, Task
from ..evaluation.probes.base import only
from ..evaluation.scores import classification_scores
from ..training import assemble
from ..training.engine import place
from ..training.metrics import MetricLog, console


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run's encoder came from."""

    name: str
    step: int


def start_without_encoder(config: Config, runtime: Runtime, *, resume: bool) -> Path:
    """Make the run folder of a run whose probes all read pixels; returns it. Collective. Raises RunFolderError."""
    folder = config.folder
    with propagate_errors():
        run_folder.check_usable(folder, config, resume=resume)
        if runtime.is_main:
            if not run_folder.is_used(folder):
                run_folder.create(folder, config)
            console.print(f"probe.kind={', '.join(config.probe.kinds)} reads pixels: no encoder is pre-trained")
    return folder


def probe(folder: Path, config: Config, runtime: Runtime, data: assemble.Data) -> list[dict[str, Any]]:
    """Fit every probe of `probe.kind` in turn; the entries written into results.json. Collective.

    Whatever is chosen (learning rate, iteration) is chosen on validation; the test set is read once, at the end of
    each probe. Raises ConfigError, DataError, RunFolderError, CheckpointCorrupt before work, NonFinite during it.
    """
    with propagate_errors():
        check_probe(config, data.splits)
    task, origin = _task(folder, config, runtime, data)
    results = []
    with MetricLog(folder if runtime.is_main else None, tensorboard=config.log.tensorboard) as log:
        for kind in config.probe.kinds:
            began = time.perf_counter()
            outcome = PROBES[kind](kind, task)
            for line in outcome.history:
                log.log(f"probe/{kind}", line["iteration"], **{k: v for k, v in line.items() if k != "iteration"})
            result = _result(task, outcome, origin) | {"seconds": round(time.perf_counter() - began, 2)}
            with propagate_errors():
                if runtime.is_main:
                    _write(folder, config, outcome, result, origin, runtime.world_size)
            names = ("probe", "chosen", "validation", "test")
            log.log("probe", origin.step if origin else 0, **{name: result[name] for name in names})
            results.append(result)
    return results


def _task(folder: Path, config: Config, runtime: Runtime, data: assemble.Data) -> tuple[Task, Origin | None]:
    origin, encoder, description, masks = None, None, None, None
    if needs_encoder(config):
        model, found = load_model(folder)
        with propagate_errors():
            check_classes(folder, found, data.splits)
        encoder = place(model.encoder, runtime, channels_last=config.train.channels_last)
        origin, description = Origin(found.path.name, found.state["step"]), found.state
        masks = found.tensors.get("masks")
    else:
        with propagate_errors():
            normalization = normalization_of(data.splits.train)
        description = {"classes": list(data.splits.classes), "normalization": normalization}
    transform = EvalTransform(**description["normalization"]).to(runtime.device)
    served: dict[str, Any] = {"loader": data.loader, "options": data.evaluation}

    def read(source: Source, input: str) -> Part:
        if input == "pixels":
            return read_images(source, runtime, **served)
        assert encoder is not None
        return extract(encoder, source, transform, runtime, **served)

    return Task(config, runtime, data, Inputs(data.splits, read), description, encoder, masks), origin


def _result(task: Task, outcome: Outcome, origin: Origin | None) -> dict[str, Any]:
    """The entry of one probe. Collective; the only place that reads the test split."""
    config, fitted = task.config, outcome.probe
    pixels = fitted.input == "pixels"
    return {
        "stage": "probe",
        "probe": fitted.kind,
        "input": fitted.input,
        "encoder": None if pixels else config.model.encoder,
        "loss": None if pixels else config.loss.label,
        "checkpoint": None if pixels or origin is None else origin.name,
        "seed": config.seed,
        "data": config.data.source,
        "classes": len(fitted.classes),
        "parameters": fitted.parameters_of_head,
        **outcome.facts,
        "chosen": outcome.chosen,
        "validation": _scores(task, fitted, "validation"),
        "test": _scores(task, fitted, "test"),
    }


def _scores(task: Task, fitted: FittedProbe, split: str) -> dict[str, float] | None:
    if getattr(task.data.splits, split) is None:
        return None
    logits, labels = _logits(task, fitted, split)
    return classification_scores(logits.argmax(dim=1), labels, len(fitted.classes))


def _logits(task: Task, fitted: FittedProbe, split: str) -> tuple[Tensor, Tensor]:
    """(logits, labels) of this rank's share."""
    if fitted.input == "images":  # streamed: a set of large images is not held
        features, labels = extract(
            fitted.encoder,
            getattr(task.data.splits, split),
            fitted.prepare,
            task.runtime,
            loader=task.data.loader,
            options=task.data.evaluation,
        )
        with torch.no_grad():
            return in_chunks(fitted.head, features), labels
    part = task.inputs.share(split, fitted.input)
    assert part is not None
    if fitted.kind == "logistic":
        first, second = (task.classes.index(name) for name in fitted.classes)
        part = only(part, (first, second))
    return fitted.logits(part[0]), part[1]


def _write(
    folder: Path, config: Config, outcome: Outcome, result: dict[str, Any], origin: Origin | None, world_size: int
) -> None:
    fitted = outcome.probe
    step = origin.step if origin and fitted.input != "pixels" else 0
    save_probe(fitted, folder / FOLDER / fitted.kind, step, world_size=world_size, config_digest=digest(config))
    draw_probe_curves(folder, fitted.kind, outcome.history, kept=outcome.chosen.get("iteration"))
    run_folder.add_result(folder, result)
