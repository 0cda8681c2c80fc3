"""Embeddings and class probabilities of images, and the files they are written to."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ConfigError
from ..files import output_file
from .images import Pictures
from .inference import Outputs, run
from .parts import Part

SUFFIXES = (".csv", ".json")


@dataclass(frozen=True)
class Predictions:
    paths: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: npt.NDArray[np.float64]
    """[n, classes], rows that sum to 1; for kNN the shares of the votes."""
    problems: tuple[str, ...]
    """A line for each image that could not be used."""

    @property
    def best(self) -> npt.NDArray[np.int64]:
        """[n]: the most probable class of each image."""
        return self.probabilities.argmax(axis=1)


def predict(part: Part, pictures: Pictures, **options: Any) -> Predictions:
    """What a classifier says of the pictures; `options` are those of `inference.run`. Raises as that does."""
    assert part.name == "classifier"
    outputs = run(part, pictures, **options)
    shares = torch.from_numpy(outputs.values).double().softmax(dim=1).numpy()
    return Predictions(tuple(pictures.paths[i] for i in outputs.rows), part.classes, shares, outputs.problems)


def check_suffix(out: Path) -> None:
    """Raise ConfigError for a file that `save` has no form for."""
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"-o {out}: predictions are written as {' or '.join(SUFFIXES)}; choose one of these endings"
        )


def save(predictions: Predictions, out: Path, *, checkpoint: str, force: bool = False) -> None:
    """Write a .csv or .json file. Raises ConfigError, OutputError."""
    check_suffix(out)
    # names of files need not be text: their bytes go into the file as they are
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
    for path, best, shares in zip(predictions.paths, predictions.best, predictions.probabilities, strict=True):
        numbers = [f"{share:.6g}" for share in shares]
        writer.writerow([path, predictions.classes[best], numbers[best], *numbers])


def as_json(predictions: Predictions, checkpoint: str) -> dict[str, Any]:
    """The same as plain data; `probabilities` are in the order of `classes`."""
    best = predictions.best.tolist()
    return {
        "checkpoint": checkpoint,
        "classes": list(predictions.classes),
        "images": [
            {"path": path, "class": predictions.classes[k], "probability": shares[k], "probabilities": shares}
            for path, k, shares in zip(predictions.paths, best, predictions.probabilities.tolist(), strict=True)
        ],
        "skipped": list(predictions.problems),
    }


def embed(part: Part, pictures: Pictures, out: Path, *, force: bool = False, **options: Any) -> Outputs:
    """Write the part's output for all pictures to `out`, which `numpy.load` reads (nothing in it is pickled).

    `embeddings` float32 [n, D] and `paths` (text) [n]; where every picture's class is known also `labels` int64
    [n], into `classes` (text). `options` are those of `inference.run`. Raises as that does, and OutputError.
    """
    outputs = run(part, pictures, **options)
    arrays: dict[str, npt.NDArray[Any]] = {
        "embeddings": outputs.values,
        "paths": np.array([pictures.paths[i] for i in outputs.rows], dtype=np.str_),
    }
    if pictures.labels is not None:
        arrays["labels"] = np.array([pictures.labels[i] for i in outputs.rows], dtype=np.int64)
        arrays["classes"] = np.array(part.classes, dtype=np.str_)
    with output_file(out, force=force) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's own flag is not among them
    return outputs
