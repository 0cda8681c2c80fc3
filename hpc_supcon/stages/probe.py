"""Stage `probe`: fits the probes of a run, on its encoder's features or on pixels, and writes results.json."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import run_folder
from ..config import Config, digest
from ..data import EvalTransform, Source, normalization_of
from ..distributed.collectives import propagate_errors
from ..distributed.folder_lock import locked
from ..distributed.launch import Runtime
from ..evaluation.encoder import check_classes, load_model, report_changed_data
from ..evaluation.features import (
    LabeledRows,
    SplitRows,
    extract,
    in_chunks,
    read_images,
    select_classes,
)
from ..evaluation.fitted_probe import FOLDER, save_probe
from ..evaluation.left_out import count_left_out, left_out_entry, tell_left_out
from ..evaluation.plots import draw_probe_curves
from ..evaluation.probes import (
    PROBES,
    FittedProbe,
    ProbeOutcome,
    ProbeTask,
    check_probes,
)
from ..evaluation.scores import classification_scores
from ..seeding import changed_since
from ..terminal import note, only_told, warn
from ..training.data import Data
from ..training.engine import place
from ..training.metrics import MetricLog
from .feature_scores import score_features
from .results import ResultWriter


@dataclass(frozen=True)
class EncoderCheckpoint:
    """The checkpoint that the run's encoder was loaded from."""

    name: str
    step: int
    projection: nn.Module | None
    """Its projection head, where it has one."""


def start_without_encoder(config: Config, runtime: Runtime) -> Path:
    """The run folder of a run whose probes all read pixels, made if it is new. Collective. Raises RunFolderError.

    The caller has checked that this run may use the folder (see run_folder.check_usable).
    """
    folder = config.folder
    with propagate_errors():
        if runtime.is_main:
            if not run_folder.is_used(folder):
                run_folder.create(folder, config)
            note(f"probe.kind={', '.join(config.probe.kinds)} reads pixels: no encoder is pre-trained")
    return folder


def probe(
    folder: Path, config: Config, runtime: Runtime, data: Data, *, writer: ResultWriter | None = None
) -> list[dict[str, Any]]:
    """Fit every probe of `probe.kind` in turn; returns the entries written into results.json. Collective.

    Every choice (learning rate, iteration) is made on validation; the test set is read once, at the end of each
    probe. writer: of a caller that calls its `check`. Raises ConfigError, DataError, RunFolderError and
    CheckpointCorrupt before any fit, NonFinite during one, ResultsNotWritten after the last.
    """
    own = writer or ResultWriter()
    with locked(folder, runtime, warn):
        results = _probe(folder, config, runtime, data, own)
    if writer is None:
        own.check()
    return results


def _probe(folder: Path, config: Config, runtime: Runtime, data: Data, writer: ResultWriter) -> list[dict[str, Any]]:
    with propagate_errors():
        check_probes(config, data.splits)
        run_folder.check_results(folder)
    tasks, encoder = _tasks(folder, config, runtime, data)
    results, fitted = [], []
    with MetricLog(folder if runtime.is_main else None, tensorboard=config.log.tensorboard) as log:
        for task in tasks:
            began = time.perf_counter()
            outcome = PROBES[task.kind].fit(task)
            for line in outcome.history:
                numbers = {name: value for name, value in line.items() if name != "iteration"}
                log.log(f"probe/{task.kind}", line["iteration"], **numbers)
            result = _result(task, outcome, encoder) | {"seconds": round(time.perf_counter() - began, 2)}
            if runtime.is_main:
                _write(folder, config, outcome, result, encoder, runtime.world_size, writer)
            names = ("probe", "chosen", "validation", "test")
            log.log("probe", encoder.step if encoder else 0, **{name: result[name] for name in names})
            results.append(result)
            fitted.append(outcome.probe)
        if encoder is not None:
            score_features(folder, tasks[0], fitted, encoder.projection, encoder.step, log=log, writer=writer)
    tell_left_out(results, data.splits, runtime)
    return results


def _tasks(
    folder: Path, config: Config, runtime: Runtime, data: Data
) -> tuple[list[ProbeTask], EncoderCheckpoint | None]:
    """A task for each of `probe.kind`; they share the encoder and the rows computed with it. Collective."""
    loaded, encoder, description, masks = None, None, None, None
    if config.probe.needs_encoder:
        model, found = load_model(folder)
        with propagate_errors():
            check_classes(folder, found, data.splits)
            if runtime.is_main:
                report_changed_data(folder, found, config, data.fingerprint)
        encoder = place(model.encoder, runtime, channels_last=config.train.channels_last)
        description = found.state
        loaded = EncoderCheckpoint(found.name, found.state["step"], dict(model.heads.items()).get("projection"))
        masks = found.tensors.get("masks")
        warning = changed_since(found.state)
        if warning is not None and runtime.is_main:
            warn(f"{folder}: {warning}")
    else:
        with propagate_errors():
            normalization = normalization_of(data.splits.train)
        description = {"classes": list(data.splits.classes), "normalization": normalization}
    transform = EvalTransform(**description["normalization"]).to(runtime.device)
    serving: dict[str, Any] = {"loader": data.loader, "options": data.evaluation}

    def read(source: Source, input: str) -> LabeledRows:
        if input == "pixels":
            return read_images(source, runtime, **serving)
        assert encoder is not None
        return extract(encoder, source, transform, runtime, **serving)

    rows = SplitRows(data.splits, read)
    tasks = [
        ProbeTask(kind, config.probe.input_of(kind), config, runtime, data, rows, description, encoder, masks)
        for kind in config.probe.kinds
    ]
    return tasks, loaded


def _result(task: ProbeTask, outcome: ProbeOutcome, encoder: EncoderCheckpoint | None) -> dict[str, Any]:
    """The entry of one probe in results.json. Collective; the only place that reads the test split."""
    config, fitted = task.config, outcome.probe
    pixels = fitted.input == "pixels"
    left_out = {} if fitted.input == "images" else {"train": task.rows.left_out["train"]}  # else replaced in training
    return {
        "stage": "probe",
        "probe": fitted.kind,
        "input": fitted.input,
        "encoder": None if pixels else config.model.encoder,
        "loss": None if pixels else config.loss.label,
        "checkpoint": None if pixels or encoder is None else encoder.name,
        "seed": config.seed,
        "data": config.data.source,
        "classes": len(fitted.classes),
        "parameters": fitted.head_parameters,
        **outcome.facts,
        "chosen": outcome.chosen,
        "validation": _scores(task, fitted, "validation", left_out),
        "test": _scores(task, fitted, "test", left_out),
        **left_out_entry(left_out),
    }


def _scores(task: ProbeTask, fitted: FittedProbe, split: str, left_out: dict[str, int]) -> dict[str, Any] | None:
    """The scores on a split; `left_out` gets the number of its images that do not decode. Collective."""
    if getattr(task.data.splits, split) is None:
        return None
    logits, labels, left_out[split] = _logits(task, fitted, split)
    return classification_scores(logits.argmax(dim=1), labels, fitted.classes)


def _logits(task: ProbeTask, fitted: FittedProbe, split: str) -> tuple[Tensor, Tensor, int]:
    """(logits, labels) of this rank's share, and the number of images that all ranks left out. Collective."""
    if fitted.input == "images":  # in batches: a split of large images may not fit into memory
        source: Source = getattr(task.data.splits, split)
        features, labels = extract(
            fitted.encoder,
            source,
            fitted.prepare,
            task.runtime,
            loader=task.data.loader,
            options=task.data.evaluation,
        )
        with torch.no_grad():
            return in_chunks(fitted.head, features), labels, count_left_out(source, labels)
    rows = task.rows.local(split, fitted.input)
    assert rows is not None
    if fitted.classes != task.classes:
        rows = select_classes(rows, [task.classes.index(name) for name in fitted.classes])
    return fitted.logits(rows[0]), rows[1], task.rows.left_out[split]


def _write(
    folder: Path,
    config: Config,
    outcome: ProbeOutcome,
    result: dict[str, Any],
    encoder: EncoderCheckpoint | None,
    world_size: int,
    writer: ResultWriter,
) -> None:
    """The entry of one probe in results.json, the fitted probe, and its curves."""
    fitted = outcome.probe
    step = encoder.step if encoder and fitted.input != "pixels" else 0
    writer.add(folder, result)
    with writer.may_fail():
        save_probe(fitted, folder / FOLDER / fitted.kind, step, world_size=world_size, config_digest=digest(config))
    with only_told():
        draw_probe_curves(folder, fitted.kind, outcome.history, kept=outcome.chosen.get("iteration"))
