"""Stage `reconstruct`: an autoencoder's reconstruction errors into results.json, and plots of a few images."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import run_folder
from ..config import Config
from ..data import EvalTransform, Source, is_picture
from ..distributed.collectives import propagate_errors
from ..distributed.launch import Runtime
from ..errors import CorruptSample
from ..evaluation.encoder import load_model
from ..evaluation.left_out import left_out_entry, tell_left_out
from ..evaluation.pictures import shown_range, stretched
from ..evaluation.plots import draw_image_rows
from ..evaluation.reconstruction import interpolate, reconstruct, reconstruction_errors, to_pixels
from ..models import PretrainingModel
from ..terminal import only_told
from ..training.data import Data
from ..training.engine import place
from ..training.metrics import MetricLog
from .results import ResultWriter, writing

IMAGES = 5
"""Images that are shown above their reconstructions."""
STEPS = 10
"""Images of the interpolation, both ends included."""


def evaluate_autoencoder(
    folder: Path, config: Config, runtime: Runtime, data: Data, *, writer: ResultWriter | None = None
) -> dict[str, Any]:
    """MAE and MSE on validation and test into results.json, reconstructions into plots/. Collective.

    Evaluates the run's best checkpoint. writer: of a caller that calls its `check`. Returns the entry of
    results.json. Raises RunFolderError, CheckpointCorrupt, what the loader raises, and ResultsNotWritten.
    """
    with writing(folder, runtime, writer) as own:
        return _evaluate(folder, config, runtime, data, own)


def _evaluate(folder: Path, config: Config, runtime: Runtime, data: Data, writer: ResultWriter) -> dict[str, Any]:
    with propagate_errors():
        run_folder.check_results(folder)
    model, found = load_model(folder)
    model = place(model, runtime, channels_last=config.train.channels_last).eval()
    transform = EvalTransform(**found.state["normalization"]).to(runtime.device)

    left_out: dict[str, int] = {}

    def errors(split: str) -> dict[str, float] | None:
        source: Source | None = getattr(data.splits, split)
        if source is None:
            return None
        found, left_out[split] = reconstruction_errors(
            model, source, transform, runtime, loader=data.loader, options=data.evaluation
        )
        return found

    result: dict[str, Any] = {
        "stage": "reconstruction",
        "probe": None,
        "encoder": config.model.encoder,
        "loss": config.loss.label,
        "checkpoint": found.name,
        "seed": config.seed,
        "data": config.data.source,
        "validation": errors("validation"),
        "test": errors("test"),
    }
    result |= left_out_entry(left_out)
    tell_left_out([result], data.splits, runtime)
    with propagate_errors():
        if runtime.is_main:
            writer.add(folder, result)
            with only_told():
                _draw(folder, model, data.splits.test or data.splits.validation or data.splits.train, transform)
    with MetricLog(folder if runtime.is_main else None, config.log) as log:
        log.log("reconstruction", found.state["step"], validation=result["validation"], test=result["test"])
    return result


@torch.no_grad()
def _draw(folder: Path, model: PretrainingModel, source: Source, transform: EvalTransform) -> None:
    """plots/reconstructions.png and plots/interpolation.png, of evenly strided images: sources are often sorted by
    class."""
    images = _some_images(source, IMAGES)
    x = transform(images.to(transform.mean.device))
    rows = {"original": to_pixels(x, transform), "reconstruction": reconstruct(model, x)}
    decoded = interpolate(model, x[0], x[-1], STEPS)
    if not is_picture(images.shape[1], images.dtype):  # all in the range of the originals
        shown = shown_range(rows["original"])
        rows = {name: stretched(row, shown) * 2 - 1 for name, row in rows.items()}
        decoded = stretched(decoded, shown) * 2 - 1
    draw_image_rows(folder, "reconstructions", rows)
    blank = torch.ones_like(rows["original"][:1]).expand(STEPS - 2, -1, -1, -1)  # white
    ends = torch.cat([rows["original"][:1], blank, rows["original"][-1:]])
    draw_image_rows(folder, "interpolation", {"original": ends, "decoded": decoded})


def _some_images(source: Source, count: int) -> Tensor:
    """[<= count, C, H, W] as stored: evenly strided images, or the next ones that decode."""
    images: dict[int, Tensor] = {}
    for start in (k * len(source) // count for k in range(min(count, len(source)))):
        for i in range(start, len(source)):
            if i in images:
                continue
            with suppress(CorruptSample):
                images[i] = source.read(i)
                break
    return torch.stack(list(images.values()))
