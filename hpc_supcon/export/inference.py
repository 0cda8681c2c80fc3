"""Embeddings and class probabilities of many images, and the files they are written to."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ConfigError, DataError
from ..files import output_file
from .images import ImageSet, decode
from .parts import ModelPart

SUFFIXES = (".csv", ".json")

ProgressCallback = Callable[[str, int, int], None]
"""Called with (name of the work, images done, images in all)."""


@dataclass(frozen=True)
class PartOutputs:
    """A model part's outputs for an ImageSet."""

    values: npt.NDArray[np.float32]
    """[n, D], a row for each image that could be decoded."""
    indices: tuple[int, ...]
    """Positions of these images in the ImageSet."""
    problems: tuple[str, ...]
    """A line for each image that could not be decoded."""


@dataclass(frozen=True)
class Predictions:
    """A classifier's probabilities for an ImageSet."""

    paths: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: npt.NDArray[np.float64]
    """[n, classes], rows that sum to 1; for kNN each class's share of the votes."""
    problems: tuple[str, ...]
    """A line for each image that could not be decoded."""

    @property
    def best(self) -> npt.NDArray[np.int64]:
        """[n]: the most probable class of each image."""
        return self.probabilities.argmax(axis=1)


@torch.no_grad()
def run_part(
    part: ModelPart,
    images: ImageSet,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    skip_corrupt: bool = False,
    progress: ProgressCallback | None = None,
) -> PartOutputs:
    """The part's output for every image, in fp32; leaves the part's module on `device`.

    progress is called after each batch. Raises as `decode`; DataError where no image can be decoded.
    """
    model, n = part.with_normalization().to(device), len(images.paths)
    values: npt.NDArray[np.float32] | None = None
    indices: list[int] = []
    problems: list[str] = []
    batch_size = min(batch_size, n)
    for batch in decode(images.source, batch_size, skip_corrupt=skip_corrupt):
        problems += batch.problems
        if batch.indices:
            # batches of one size: another size may take another kernel, which rounds differently
            missing = batch_size - len(batch.indices)
            padded = torch.cat([batch.images, batch.images[-1:].expand(missing, -1, -1, -1)])
            out = model(padded.to(device)).float()[: len(batch.indices)].cpu().numpy()
            if values is None:
                values = np.empty((n, out.shape[1]), dtype=np.float32)
            values[len(indices) : len(indices) + len(out)] = out
            indices += batch.indices
        if progress is not None:
            progress("images", len(indices) + len(problems), n)
    if values is None:
        raise DataError(f"none of {n} images can be used; the first: {problems[0]}")
    return PartOutputs(values[: len(indices)], tuple(indices), tuple(problems))


def embed(part: ModelPart, images: ImageSet, out: Path, *, force: bool = False, **options: Any) -> PartOutputs:
    """Write the part's output for all images to `out`, which `numpy.load` reads (nothing in it is pickled).

    `embeddings` float32 [n, D] and `paths` (text) [n]; where every image's class is known also `labels` int64 [n],
    indices into `classes` (text). options: those of `run_part`. Raises as that does, and OutputError.
    """
    outputs = run_part(part, images, **options)
    arrays: dict[str, npt.NDArray[Any]] = {
        "embeddings": outputs.values,
        "paths": np.array([images.paths[i] for i in outputs.indices], dtype=np.str_),
    }
    if images.labels is not None:
        arrays["labels"] = np.array([images.labels[i] for i in outputs.indices], dtype=np.int64)
        arrays["classes"] = np.array(part.classes, dtype=np.str_)
    with output_file(out, force=force) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's annotation does not expect arrays by name
    return outputs


def predict(part: ModelPart, images: ImageSet, **options: Any) -> Predictions:
    """A classifier's predictions for the images. options: those of `run_part`. Raises as that does."""
    assert part.name == "classifier"
    outputs = run_part(part, images, **options)
    probabilities = torch.from_numpy(outputs.values).double().softmax(dim=1).numpy()
    paths = tuple(images.paths[i] for i in outputs.indices)
    return Predictions(paths, part.classes, probabilities, outputs.problems)


def check_suffix(out: Path) -> None:
    """Raise ConfigError unless `save_predictions` has a format for this file name."""
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"-o {out}: predictions are written as {' or '.join(SUFFIXES)}; choose one of these endings"
        )


def save_predictions(predictions: Predictions, out: Path, *, checkpoint: str, force: bool = False) -> None:
    """Write a .csv or .json file. Raises ConfigError, OutputError."""
    check_suffix(out)
    # file names need not be valid text: surrogateescape writes their bytes unchanged
    with (
        output_file(out, force=force) as partial,
        partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        if out.suffix.lower() == ".csv":
            write_csv(predictions, file)
        else:
            json.dump(as_json(predictions, checkpoint), file, indent=2)
            file.write("\n")


def write_csv(predictions: Predictions, file: TextIO) -> None:
    """A row for each image: path, class, probability, then the probability of every class."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", "class", "probability", *(f"p({name})" for name in predictions.classes)])
    for path, best, row in zip(predictions.paths, predictions.best, predictions.probabilities, strict=True):
        numbers = [f"{probability:.6g}" for probability in row]
        writer.writerow([path, predictions.classes[best], numbers[best], *numbers])


def as_json(predictions: Predictions, checkpoint: str) -> dict[str, Any]:
    """The same as plain data; `probabilities` are in the order of `classes`."""
    best = predictions.best.tolist()
    return {
        "checkpoint": checkpoint,
        "classes": list(predictions.classes),
        "images": [
            {"path": path, "class": predictions.classes[k], "probability": row[k], "probabilities": row}
            for path, k, row in zip(predictions.paths, best, predictions.probabilities.tolist(), strict=True)
        ],
        "skipped": list(predictions.problems),
    }
