"""Stage `probe`: fits the probes of a run, on its encoder's features or on pixels, and writes their scores."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import run_folder
from ..config import Config, digest
from ..data import EvalTransform, Source, check_depth, normalization_of, pixel_dtype
from ..distributed.collectives import propagate_errors
from ..distributed.launch import Runtime
from ..errors import MissingExtra
from ..evaluation.confusion_figure import draw_confusion
from ..evaluation.encoder import check_classes, load_model, report_changed_data
from ..evaluation.features import IndexedRows, SplitRows, extract_indexed, read_indexed
from ..evaluation.fitted_probe import FOLDER, save_probe
from ..evaluation.left_out import left_out_entry, tell_left_out
from ..evaluation.plots import draw_probe_curves
from ..evaluation.predictions import check_predictions, write_predictions
from ..evaluation.probes import (
    ProbeOutcome,
    ProbeTask,
    check_probes,
    probe_spec,
)
from ..evaluation.scored_probe import ScoredProbe, score_probe
from ..evaluation.scores import headline_entry
from ..evaluation.transfer import check_scores, data_name, is_copy, transfer_configs, without_transfer
from ..seeding import changed_since
from ..terminal import note, only_told, warn
from ..training.data import Data, load_data
from ..training.engine import place
from ..training.metrics import MetricLog
from .corruptions import add_corruptions
from .feature_scores import score_features
from .results import ResultWriter, writing


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
    folder: Path,
    config: Config,
    runtime: Runtime,
    data: Data,
    *,
    writer: ResultWriter | None = None,
    is_other: bool = False,
) -> list[dict[str, Any]]:
    """Fit every probe of `probe.kind` in turn; returns the entries written into results.json. Collective.

    Every choice (learning rate, iteration) is made on validation; the test set is read once, at the end of each
    probe. Then the same with each set of `probe.transfer` in place of `data`. Images without labels have no probes of
    their own. writer: of a caller that calls its `check`. is_other: the settings name other data than the run's own
    (see transfer.is_other_data); all is then filed under its name, unless it is a copy. The caller has called
    `check_probes`. Raises ConfigError, DataError, RunFolderError and CheckpointCorrupt before any fit, NonFinite
    during one, ResultsNotWritten after the last.
    """
    with writing(folder, runtime, writer) as own:
        results = []
        if data.splits.has_labels:
            results += _probe(folder, without_transfer(config), runtime, data, own, is_other)
        elif runtime.is_main:
            note(f"{folder}: the images have no labels (data.labels=none): no probe is fitted on them")
        for text, other in transfer_configs(config, data.splits.image_size, data.splits.channels):
            if runtime.is_main:
                note(f"probe.transfer={text}:")
            results += _probe(folder, other, runtime, load_data(other, runtime), own, is_other=True)
        return results


def _probe(
    folder: Path, config: Config, runtime: Runtime, data: Data, writer: ResultWriter, is_other: bool
) -> list[dict[str, Any]]:
    with propagate_errors():
        check_probes(config, data.splits)
        run_folder.check_results(folder)
        _check_predictions(folder, runtime)
    tasks, encoder = _tasks(folder, config, runtime, data, is_other)
    results, fitted = [], []
    with MetricLog(folder if runtime.is_main else None, config.log) as log:
        for task in tasks:
            began = time.perf_counter()
            outcome = probe_spec(task.kind).fit(task)
            for line in outcome.history:
                numbers = {name: value for name, value in line.items() if name != "iteration"}
                log.log(f"probe/{task.name}", line["iteration"], **numbers)
            scored = score_probe(task, outcome.probe)
            result = _result(task, outcome, encoder, scored) | {"seconds": round(time.perf_counter() - began, 2)}
            if runtime.is_main:
                _write(folder, task, outcome, result, scored, encoder, writer)
            names = ("probe", "chosen", "validation", "test")
            log.log("probe", encoder.step if encoder else 0, **{name: result[name] for name in names})
            results.append(result)
            fitted.append(outcome.probe)
        if encoder is not None:
            score_features(folder, tasks[0], fitted, encoder.projection, encoder.step, log=log, writer=writer)
    add_corruptions(folder, tasks, fitted, results, writer)
    tell_left_out(results, data.splits, runtime)
    return results


def _tasks(
    folder: Path, config: Config, runtime: Runtime, data: Data, is_other: bool
) -> tuple[list[ProbeTask], EncoderCheckpoint | None]:
    """A task for each of `probe.kind`; they share the encoder and the rows computed with it. Collective."""
    loaded, encoder, description, masks, other_data = None, None, None, None, ""
    if config.probe.needs_encoder:
        model, found = load_model(folder)
        with propagate_errors():
            if is_other and not is_copy(run_folder.read_config(folder), config, found, data.fingerprint):
                other_data = _check_other(folder, config, runtime, data)
            else:
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
            if is_other:
                other_data = _check_other(folder, config, runtime, data)
            normalization = normalization_of(data.splits.train)
        description = {"classes": list(data.splits.classes), "normalization": normalization}
    transform = EvalTransform(**description["normalization"]).to(runtime.device)
    with propagate_errors():
        check_depth(pixel_dtype(data.splits.train), transform.dtype)
    serving: dict[str, Any] = {"loader": data.loader, "options": data.evaluation}

    def read(source: Source, input: str) -> IndexedRows:
        if input == "pixels":
            return read_indexed(source, runtime, **serving)
        assert encoder is not None
        return extract_indexed(encoder, source, transform, runtime, **serving)

    rows = SplitRows(data.splits, read)
    tasks = [
        ProbeTask(
            kind, config.probe.input_of(kind), config, runtime, data, rows, description, encoder, masks, other_data
        )
        for kind in config.probe.kinds
    ]
    return tasks, loaded


def _check_other(folder: Path, config: Config, runtime: Runtime, data: Data) -> str:
    """The name of data that are not the run's own. Tells how they are read. Raises ConfigError."""
    name, splits = data_name(config), data.splits
    check_scores(config, name)
    if runtime.is_main:
        channels = {1: "gray", 3: "RGB"}.get(splits.channels, f"{splits.channels}-channel")
        normalized = " and normalized as it was trained" if config.probe.needs_encoder else ""
        note(
            f"{folder}: other data, {name}: {len(splits.classes)} classes, read as {channels} images of "
            f"{splits.image_size} x {splits.image_size} pixels{normalized}; results are filed under KIND@{name}"
        )
    return name


def _check_predictions(folder: Path, runtime: Runtime) -> None:
    """As check_predictions; without pyarrow all but that file is written."""
    try:
        check_predictions(folder)
    except MissingExtra as error:
        if runtime.is_main:
            warn(str(error))


def _result(
    task: ProbeTask, outcome: ProbeOutcome, encoder: EncoderCheckpoint | None, scored: ScoredProbe
) -> dict[str, Any]:
    """The entry of one probe in results.json."""
    config, fitted = task.config, outcome.probe
    pixels = fitted.input == "pixels"
    return {
        "stage": "probe",
        "probe": task.name,
        "input": fitted.input,
        "encoder": None if pixels else config.model.encoder,
        "loss": None if pixels else config.loss.label,
        "checkpoint": None if pixels or encoder is None else encoder.name,
        "seed": config.seed,
        "data": task.other_data or config.data.source,
        "classes": len(fitted.classes),
        "parameters": fitted.head_parameters,
        **outcome.facts,
        "chosen": outcome.chosen,
        **{
            split: headline_entry(scored.scores[split], fitted.classes) if split in scored.scores else None
            for split in ("train", "validation", "test")
        },
        **left_out_entry(scored.left_out),
    }


def _write(
    folder: Path,
    task: ProbeTask,
    outcome: ProbeOutcome,
    result: dict[str, Any],
    scored: ScoredProbe,
    encoder: EncoderCheckpoint | None,
    writer: ResultWriter,
) -> None:
    """The entry of one probe in results.json, its scores, its predictions, the fitted probe, and its pictures."""
    fitted, config, runtime = outcome.probe, task.config, task.runtime
    step = encoder.step if encoder and fitted.input != "pixels" else 0
    writer.add(folder, result)
    scores = {"checkpoint": result["checkpoint"], "classes": list(fitted.classes), "splits": scored.scores}
    with writer.may_fail():
        run_folder.add_scores(folder, "probes", task.name, scores)
    with writer.may_fail(), suppress(MissingExtra):  # which was told before
        write_predictions(
            folder,
            task.name,
            scored.predictions,
            paths={split: getattr(task.data.splits, split).paths for split in scored.predictions},
            root=None if config.data.root is None else Path(config.data.root).expanduser(),
        )
    if task.kind not in config.probe.own:  # of which nothing could be saved without pickling it
        with writer.may_fail():
            path = folder / FOLDER / task.name
            save_probe(fitted, path, step, world_size=runtime.world_size, config_digest=digest(config))
    with only_told():
        kept, title = outcome.chosen.get("iteration"), _title(config, task.name)
        draw_probe_curves(folder, task.name, outcome.history, kept=kept, title=title)
        draw_confusion(folder, task.name, scored.scores["test"]["confusion"], fitted.classes)


def _title(config: Config, kind: str) -> str | None:
    """TITLE of images/loss-TITLE.png: report.title itself where no other curves of the run have that name."""
    title = config.report.title
    is_only = len(config.probe.kinds) == 1 and not config.probe.needs_encoder
    return title if title is None or is_only else f"{title}-{kind}"
