"""How well an autoencoder gives images back: errors over all images, and pictures of a few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import run_folder
from ..config import Config
from ..data import EvalTransform, Source
from ..distributed.collectives import all_sum, propagate_errors
from ..distributed.launch import Runtime
from ..evaluation.encoder import load_model
from ..evaluation.features import extract
from ..evaluation.plots import save_tiles
from ..models import PretrainingModel
from ..training import assemble
from ..training.engine import place
from ..training.metrics import MetricLog

SHOWN = 5
"""Originals over their reconstructions."""
STEPS = 10
"""Images from one to the other, both ends included."""


class _Errors(nn.Module):
    """Normalized images [N, C, H, W] -> [N, 2]: mean absolute and squared error of each, pixels in -1..1."""

    feature_dim = 2

    def __init__(self, model: PretrainingModel, transform: EvalTransform) -> None:
        super().__init__()
        self.model, self.transform = model, transform

    def forward(self, x: Tensor) -> Tensor:
        error = reconstruct(self.model, x) - pixels_of(x, self.transform)
        return torch.stack([error.abs().mean(dim=(1, 2, 3)), error.square().mean(dim=(1, 2, 3))], dim=1)


def reconstruct(model: PretrainingModel, x: Tensor) -> Tensor:
    """[N, C, H, W] normalized -> [N, C, H, W] in -1..1."""
    return model.heads["decoder"](model.encoder(x))


def interpolate(model: PretrainingModel, first: Tensor, last: Tensor, steps: int = STEPS) -> Tensor:
    """Decoded points at equal distances on the line between two images' latents: [steps, C, H, W] in -1..1.

    first, last: [C, H, W], normalized. The ends are the reconstructions of the two.
    """
    a, b = model.encoder(torch.stack([first, last]))
    share = torch.linspace(0, 1, steps, device=a.device)[:, None]
    return model.heads["decoder"](torch.lerp(a[None], b[None], share))


def pixels_of(x: Tensor, transform: EvalTransform) -> Tensor:
    """Normalized images back to pixels in -1..1."""
    shape = (-1, 1, 1)
    return (x * transform.std.view(shape) + transform.mean.view(shape)) * 2 - 1


@torch.no_grad()
def evaluate_autoencoder(folder: Path, config: Config, runtime: Runtime, data: assemble.Data) -> dict[str, Any]:
    """MAE and MSE on validation and test into results.json, pictures into plots/. Collective.

    Reads the run's best checkpoint. Raises RunFolderError, CheckpointCorrupt, and what the loader raises.
    """
    model, found = load_model(folder)
    model = place(model, runtime, channels_last=config.train.channels_last).eval()
    transform = EvalTransform(**found.state["normalization"]).to(runtime.device)

    def errors(source: Source | None) -> dict[str, float] | None:
        if source is None:
            return None
        served: dict[str, Any] = {"loader": data.loader, "options": data.evaluation}
        rows, _ = extract(_Errors(model, transform), source, transform, runtime, **served)
        total = all_sum(torch.cat([rows.double().sum(0), rows.new_full((1,), len(rows)).double()]))
        mae, mse = (total[:2] / total[2]).tolist()
        return {"mae": mae, "mse": mse}

    result = {
        "stage": "reconstruction",
        "probe": None,
        "encoder": config.model.encoder,
        "loss": config.loss.label,
        "checkpoint": found.path.name,
        "seed": config.seed,
        "data": config.data.source,
        "validation": errors(data.splits.validation),
        "test": errors(data.splits.test),
    }
    with propagate_errors():
        if runtime.is_main:
            run_folder.add_result(folder, result)
            _draw(folder, model, data.splits.validation or data.splits.train, transform)
    with MetricLog(folder if runtime.is_main else None, tensorboard=False) as log:
        log.log("reconstruction", found.state["step"], validation=result["validation"], test=result["test"])
    return result


def _draw(folder: Path, model: PretrainingModel, source: Source, transform: EvalTransform) -> None:
    """plots/reconstructions.png and plots/interpolation.png. Images far apart: files are sorted by class."""
    chosen = [i * len(source) // SHOWN for i in range(min(SHOWN, len(source)))]
    images = torch.stack([source.read(i) for i in chosen]).to(transform.mean.device)
    x = transform(images)
    rows = {"original": pixels_of(x, transform), "reconstruction": reconstruct(model, x)}
    save_tiles(folder, "reconstructions", rows)
    between = torch.ones_like(x[:1]).expand(STEPS - 2, -1, -1, -1)  # white
    ends = torch.cat([rows["original"][:1], between, rows["original"][-1:]])
    save_tiles(folder, "interpolation", {"original": ends, "decoded": interpolate(model, x[0], x[-1])})
