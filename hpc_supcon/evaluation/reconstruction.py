"""How well an autoencoder reconstructs images: reconstructions, interpolations, and errors over a whole split."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import EvalTransform, LoaderOptions, Source
from ..distributed.collectives import all_sum
from ..distributed.launch import Runtime
from ..models import PretrainingModel
from .features import extract
from .left_out import count_left_out


def reconstruct(model: PretrainingModel, x: Tensor) -> Tensor:
    """[N, C, H, W] normalized -> [N, C, H, W] in -1..1."""
    return model.heads["decoder"](model.encoder(x))


def interpolate(model: PretrainingModel, first: Tensor, last: Tensor, steps: int) -> Tensor:
    """Decoded points at equal distances on the line between two images' features: [steps, C, H, W] in -1..1.

    first, last: [C, H, W], normalized. The two ends are the images' reconstructions.
    """
    a, b = model.encoder(torch.stack([first, last]))
    weight = torch.linspace(0, 1, steps, device=a.device)[:, None]
    return model.heads["decoder"](torch.lerp(a[None], b[None], weight))


def to_pixels(x: Tensor, transform: EvalTransform) -> Tensor:
    """Normalized images back to pixels in -1..1."""
    shape = (-1, 1, 1)
    return (x * transform.std.view(shape) + transform.mean.view(shape)) * 2 - 1


@torch.no_grad()
def reconstruction_errors(
    model: PretrainingModel,
    source: Source,
    transform: EvalTransform,
    runtime: Runtime,
    *,
    loader: str = "resident",
    options: LoaderOptions | None = None,
) -> tuple[dict[str, float], int]:
    """({"mae", "mse"}: mean absolute and squared error of pixels in -1..1 over the images of `source`, how many of
    them were left out because they do not decode). Collective. Raises as count_left_out."""
    errors, labels = extract(_Errors(model, transform), source, transform, runtime, loader=loader, options=options)
    left_out = count_left_out(source, labels)
    total = all_sum(torch.cat([errors.double().sum(0), errors.new_full((1,), len(errors)).double()]))
    mae, mse = (total[:2] / total[2]).tolist()
    return {"mae": mae, "mse": mse}, left_out


class _Errors(nn.Module):
    """Normalized images [N, C, H, W] -> [N, 2]: mean absolute and squared error of each image."""

    feature_dim = 2

    def __init__(self, model: PretrainingModel, transform: EvalTransform) -> None:
        super().__init__()
        self.model, self.transform = model, transform

    def forward(self, x: Tensor) -> Tensor:
        error = reconstruct(self.model, x) - to_pixels(x, self.transform)
        return torch.stack([error.abs().mean(dim=(1, 2, 3)), error.square().mean(dim=(1, 2, 3))], dim=1)
