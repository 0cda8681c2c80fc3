"""What stage `probe` says about the encoder's features besides its probes: sections of scores.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import run_folder
from ..data import EvalTransform, Source, choose_loader
from ..distributed.collectives import gather_objects, propagate_errors
from ..evaluation.embedding_scores import embedding_scores
from ..evaluation.features import extract, in_chunks
from ..evaluation.left_out import count_left_out
from ..evaluation.ood import (
    Detector,
    flat,
    knn_detector,
    mahalanobis_detector,
    max_softmax_scores,
    ood_scores,
)
from ..evaluation.probes import FittedProbe, ProbeTask
from ..seeding import stream
from ..terminal import note, warn
from ..training.agreement import agreed_fingerprint
from ..training.data import open_ood
from ..training.metrics import MetricLog
from .results import ResultWriter

SHOWN = {"recall_at_1": "R@1", "map_at_r": "MAP@R", "silhouette": "silhouette", "effective_rank": "effective rank"}


def score_features(
    folder: Path,
    task: ProbeTask,
    fitted: Sequence[FittedProbe],
    projection: nn.Module | None,
    step: int,
    *,
    log: MetricLog,
    writer: ResultWriter,
) -> None:
    """Write the sections `embedding` and `ood` that `probe.embedding` and `probe.ood` ask for. Collective.

    task: one of the run's probes, whose encoder and rows are used; fitted: all its fitted probes; projection: the
    head of pre-training, where the run has one. Raises what embedding_scores, ood_scores and open_ood raise.
    """

    of_data = f"@{task.other_data}" if task.other_data else ""

    def write(section: str, key: str, scores: dict[str, Any]) -> None:
        if task.runtime.is_main:
            with writer.may_fail():
                run_folder.add_scores(folder, section, key, scores)

    if task.config.probe.embedding:
        for space, scores in _embeddings(task, projection).items():
            write("embedding", space + of_data, {"split": "test", **scores})
            log.log("embedding", step, space=space + of_data, **scores)
            if task.runtime.is_main:
                shown = (f"{title} {_text(scores[name])}" for name, title in SHOWN.items())
                note(f"embedding ({space}{of_data}): {'  '.join(shown)}")
    if task.config.probe.ood:
        for name, found in _ood(task, fitted).items():
            write("ood", name, found)
            log.log("ood", step, data=name, **flat(found))
            if task.runtime.is_main:
                shown = (f"{detector} {found[detector]['auroc']:.4f}" for detector in found)
                note(f"out of distribution ({name}), AUROC: {'  '.join(shown)}")


def _embeddings(task: ProbeTask, projection: nn.Module | None) -> dict[str, dict[str, Any]]:
    """Scores of the test split by space. Collective."""
    rows = task.rows.local("test", "features")
    assert rows is not None
    spaces = {"encoder": rows[0]}
    if projection is not None:
        with torch.no_grad():
            spaces["projection"] = in_chunks(projection.to(task.runtime.device).eval(), rows[0])
    seed = stream(task.config.seed, "probe")
    return {space: embedding_scores(features, rows[1], seed=seed) for space, features in spaces.items()}


def _ood(task: ProbeTask, fitted: Sequence[FittedProbe]) -> dict[str, dict[str, Any]]:
    """Scores of every detector, by data set of `probe.ood`. Collective."""
    with propagate_errors():
        sources = open_ood(task.config, task.data.splits)
    train, test = (task.rows.local(split, "features") for split in ("train", "test"))
    assert train is not None
    assert test is not None
    detectors: dict[str, Detector] = {
        "knn": knn_detector(train[0], task.config.probe.knn.k),
        "mahalanobis": mahalanobis_detector(train, len(task.classes)),
    }
    own = {name: detect(test[0]) for name, detect in detectors.items()}
    classifier = _classifier(task, fitted)
    if classifier is not None:
        own["max_softmax"] = _uncertainties(task, classifier, task.data.splits.labeled_test, test[0])
    scores: dict[str, dict[str, Any]] = {}
    for text, source in sources.items():
        agreed_fingerprint(type(task.data.splits)(source, None, source))
        features = _features(task, source)
        other = {detector: detect(features) for detector, detect in detectors.items()}
        if classifier is not None:
            other["max_softmax"] = _uncertainties(task, classifier, source, features)
        found: dict[str, dict[str, Any]] = {name: {**ood_scores(own[name], other[name])} for name in own}
        if classifier is not None:
            found["max_softmax"]["probe"] = classifier.kind
        scores[text] = found
    return scores


def _classifier(task: ProbeTask, fitted: Sequence[FittedProbe]) -> FittedProbe | None:
    """The probe whose softmax is used: of those that read features and know all classes, the first that was trained
    on them; else a fine-tuned one, else `knn`."""
    known = [probe for probe in fitted if probe.input != "pixels" and probe.classes == task.classes]
    return min(known, key=lambda probe: (probe.kind == "knn", probe.input == "images"), default=None)


def _features(task: ProbeTask, source: Source, probe: FittedProbe | None = None) -> Tensor:
    """This rank's features of `source`, by the run's encoder or by that of a fine-tuned probe. Collective."""
    runtime, data = task.runtime, task.data
    encoder = task.encoder if probe is None else probe.encoder
    assert encoder is not None
    if probe is None:
        transform: nn.Module = EvalTransform(**task.description["normalization"]).to(runtime.device)
    else:
        transform = probe.prepare
    loader = data.loader
    if source is not data.splits.test:  # what the run's own loader reads may be files of another kind
        loader, _ = gather_objects(choose_loader(source, runtime.device, data.evaluation))[0]
    features, labels = extract(encoder, source, transform, runtime, loader=loader, options=data.evaluation)
    left_out = count_left_out(source, labels)
    if left_out and probe is None and runtime.is_main:
        warn(f"{left_out} of {len(source)} images of probe.ood cannot be decoded and are left out")
    return features


def _uncertainties(task: ProbeTask, probe: FittedProbe, source: Source, features: Tensor) -> Tensor:
    """max_softmax_scores of this rank's images, whose features by the run's encoder are given. Collective."""
    if probe.input == "features":
        return max_softmax_scores(probe.logits(features))
    with torch.no_grad():
        return max_softmax_scores(in_chunks(probe.head, _features(task, source, probe)))


def _text(score: float | int | None) -> str:
    return "-" if score is None else f"{score:.4f}"
