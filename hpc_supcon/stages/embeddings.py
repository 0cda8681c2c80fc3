"""Stage `embeddings`: maps of a run's images, before and after training, and the nearest neighbors of a few."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import Config
from ..data import Source
from ..distributed.collectives import propagate_errors
from ..distributed.launch import Runtime
from ..errors import DataError, RunFolderError
from ..evaluation.map_figures import Classes, FittedMap, drawing, map_figure, overview_figure, save_figure
from ..evaluation.maps import (
    MIN_POINTS,
    FitOptions,
    Points,
    fit_aligned,
    fitting_perplexities,
    missing_packages,
    sample_of,
)
from ..evaluation.neighbors import Neighbors, choose_queries, find_neighbors, neighbors_figure
from ..evaluation.pictures import pictures_of
from ..evaluation.spaces import (
    TrainedModel,
    Version,
    check_has_checkpoint,
    load_trained,
    read_versions,
    reads_encoder,
)
from ..files import atomic_path, write_atomically
from ..pages.thumbnails import TILE, WEBP, write_thumbnails
from ..seeding import stream
from ..terminal import note, only_told, warn
from ..training.data import Data
from .results import ResultWriter, writing

FOLDER = "embeddings"
SAMPLE, QUERIES, FIT = range(3)
"""Indices of the random stream "maps"."""


def draw_embeddings(
    folder: Path,
    config: Config,
    runtime: Runtime,
    data: Data,
    *,
    writer: ResultWriter | None = None,
    required: bool = True,
) -> list[FittedMap]:
    """Maps of the run's images and the nearest neighbors of a few, into `folder`/embeddings. Collective.

    Returns the maps, on rank 0. writer: of a caller that calls its `check`. required: raise MissingExtra for a method
    that is not installed, and DataError where there are too few images; else both are told, and the rest is drawn.
    Raises ConfigError, DataError, RunFolderError, CheckpointCorrupt, NonFinite, and ResultsNotWritten after the last
    file.
    """
    with writing(folder, runtime, writer) as own:
        return _draw(folder, config, runtime, data, own, required)


def _draw(
    folder: Path, config: Config, runtime: Runtime, data: Data, writer: ResultWriter, required: bool
) -> list[FittedMap]:
    began, config = time.perf_counter(), _with_drawn_split(config, data)
    report = config.report
    with propagate_errors():
        check_has_checkpoint(folder, config)
        source: Source | None = getattr(data.splits, report.split)
        if source is None:
            raise DataError(f"report.split={report.split}: the data have no such split; choose test or train")
        missing = missing_packages(report.methods)
        if required and missing:
            raise next(iter(missing.values()))
    trained = load_trained(folder, config, runtime, data) if reads_encoder(config) else None
    sample = sample_of(source.labels, report.points, stream(config.seed, "maps", SAMPLE))
    versions = list(read_versions(folder, config, runtime, data, source, sample, trained))
    index = versions[-1].index
    if len(index) < MIN_POINTS:
        too_few = f"report.split={report.split} has {len(index)} images that decode, a map needs {MIN_POINTS}"
        if required:
            raise DataError(too_few)
        if runtime.is_main:
            warn(f"embeddings: not drawn: {too_few}")
        return []
    maps: list[FittedMap] = []
    with propagate_errors():
        if runtime.is_main:
            for error in missing.values():
                warn(f"embeddings: not drawn: {error}")
            methods = [method for method in report.methods if method not in missing]
            maps = _fit(config, versions, methods)
            _write_maps(folder, config, source, versions, maps, writer)
            with only_told():
                _write_thumbnails(folder / FOLDER, source, index)
    if trained is not None and report.queries and "encoder" in report.spaces:
        _neighbors(folder, config, runtime, data, source, index, trained, writer)
    if runtime.is_main:
        seconds = time.perf_counter() - began
        note(f"embeddings: {len(maps)} maps of {len(index):,} {report.split} images ({seconds:.0f} s)")
    return maps


def _with_drawn_split(config: Config, data: Data) -> Config:
    """With the images that are not trained on in place of a test split, which images without labels need not have."""
    if config.report.split != "test" or data.splits.test is not None:
        return config
    split = "train" if data.splits.validation is None else "validation"
    return config.model_copy(update={"report": config.report.model_copy(update={"split": split})})


def _fit(config: Config, versions: Sequence[Version], methods: Sequence[str]) -> list[FittedMap]:
    """Every map, in the order in which they are shown; those of one method are aligned with each other."""
    options = FitOptions(stream(config.seed, "maps", FIT) % 2**32, _perplexities(config))
    n = len(versions[-1].index)
    if "tsne" in methods and (lower := fitting_perplexities(options.perplexities, n)) != options.perplexities:
        note(
            f"embeddings: report.perplexity={config.report.perplexity:g} is lowered to {lower[-1]:.3g}: "
            f"{n} points have too few neighbors"
        )
    spaces, last = list(versions[-1].spaces), len(versions) - 1
    points = {
        (space, i): Points(version.spaces[space])
        for space in spaces
        for i, version in enumerate(versions)
        if space in version.spaces
    }
    maps = []
    for method in methods:
        reference = ("encoder" if "encoder" in spaces else spaces[0], last)
        for (space, i), mapped in fit_aligned(method, points, reference, options).items():
            own, version = points[space, i], versions[i]
            is_pixels, shares = space == "pixels", method == "pca" and not own.is_one
            maps.append(
                FittedMap(
                    space,
                    method,
                    version="" if is_pixels else version.name,
                    caption="" if is_pixels else version.caption,
                    points=mapped,
                    trustworthiness=own.trustworthiness(mapped),
                    explained=own.components[1] if shares else None,
                )
            )
    return maps


def _perplexities(config: Config) -> tuple[float, ...]:
    given = config.report.perplexity
    return tuple(sorted(set(given))) if isinstance(given, tuple) else (given,)


def _write_maps(
    folder: Path,
    config: Config,
    source: Source,
    versions: Sequence[Version],
    maps: Sequence[FittedMap],
    writer: ResultWriter,
) -> None:
    """embeddings/NAME.npz, .png and .svg of every map, and overview.png and .svg of all."""
    index = versions[-1].index
    labels = source.labels[index].numpy()
    checkpoints = {version.name: version.checkpoint for version in versions}
    for drawn in maps:
        arrays = {
            "points": drawn.points.astype(np.float32),
            "index": index.numpy(),
            "labels": labels,
            "classes": np.array(source.classes, dtype=str),
            "trustworthiness": np.float64(drawn.trustworthiness),
            "checkpoint": np.array("" if drawn.space == "pixels" else checkpoints[drawn.version]),
        }
        if drawn.explained is not None:
            arrays["explained"] = drawn.explained
        with writer.may_fail():
            _save_arrays(folder / FOLDER / f"{drawn.name}.npz", arrays)
    classes = Classes.of(labels, source.classes)
    about = f"{config.name}: {len(index):,} {config.report.split} images"
    run = f"{config.name}: {config.model.encoder}, {config.loss.label}" if reads_encoder(config) else config.name
    perplexities = ", ".join(f"{p:g}" for p in fitting_perplexities(_perplexities(config), len(index)))
    with only_told(), drawing():
        for drawn in maps:
            save_figure(map_figure(drawn, classes, about), folder / FOLDER / drawn.name)
        labeled = f"{len(np.unique(labels)):,} classes" if source.classes else "no labels"
        title = f"{run}\n{len(index):,} {config.report.split} images, {labeled}"
        overview = overview_figure(maps, classes, title, {"tsne": f" (perplexity {perplexities})"})
        save_figure(overview, folder / FOLDER / "overview")


def _write_thumbnails(folder: Path, source: Source, index: Tensor) -> None:
    """The images of the maps, for the page (see write_thumbnails). Raises RunFolderError."""
    images = []
    for i in index.tolist():
        image = source.read(i)
        if max(image.shape[1:]) > TILE:  # one at a time: thousands of large images do not fit into memory
            sides = [max(1, round(side * TILE / max(image.shape[1:]))) for side in image.shape[1:]]
            image = F.interpolate(image[None].float(), sides, mode="area")[0].round().to(image.dtype)
        images.append(image)
    try:
        write_thumbnails(folder, pictures_of(torch.stack(images)).numpy(), index.numpy())
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder / WEBP}: not written: {error}") from None


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """A .npz file. Raises RunFolderError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise RunFolderError(f"{path}: not written: {error.strerror or error}") from None


def _neighbors(
    folder: Path,
    config: Config,
    runtime: Runtime,
    data: Data,
    source: Source,
    index: Tensor,
    trained: TrainedModel,
    writer: ResultWriter,
) -> None:
    """embeddings/neighbors.json, .png and .svg, of some of the images `index`. Collective."""
    report = config.report
    seed = stream(config.seed, "maps", QUERIES)
    queries = index[choose_queries(source.labels[index], report.queries, seed)]
    serving: dict[str, Any] = {"loader": data.loader, "options": data.evaluation}
    encoder = trained.model.encoder
    found = find_neighbors(encoder, source, queries, trained.transform, runtime, k=report.neighbors, **serving)
    with propagate_errors():
        if not runtime.is_main:
            return
        with writer.may_fail():
            _save_neighbors(folder / FOLDER / "neighbors.json", config, source, found, trained.found.name)
        numbers = torch.cat([found.queries, found.index.flatten()]).unique().tolist()
        shown = dict(zip(numbers, pictures_of(torch.stack([source.read(i) for i in numbers])), strict=True))
        same = int((source.labels[found.index] == source.labels[found.queries][:, None]).sum())
        title = f"{config.name}: nearest {report.split} images by the encoder's features ({trained.found.name})"
        if source.classes:
            title += (
                f"\n{same} of {found.index.numel()} neighbors have the query's class (green; others: dashed red, ×)"
            )
        with only_told(), drawing():
            figure = neighbors_figure(shown, found, source.labels, source.classes, title)
            save_figure(figure, folder / FOLDER / "neighbors")


def _save_neighbors(path: Path, config: Config, source: Source, found: Neighbors, checkpoint: str) -> None:
    """Raises RunFolderError."""
    rows = zip(found.queries.tolist(), found.index.tolist(), found.similarities.tolist(), strict=True)
    content = {
        "checkpoint": checkpoint,
        "space": "encoder",
        "split": config.report.split,
        "similarity": "cosine",
        "classes": list(source.classes),
        "queries": [
            {
                "index": query,
                "label": int(source.labels[query]),
                "neighbors": neighbors,
                "labels": source.labels[neighbors].tolist(),
                "similarities": [round(similarity, 6) for similarity in similarities],
            }
            for query, neighbors, similarities in rows
        ],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise RunFolderError(f"{path}: not written: {error.strerror or error}") from None
