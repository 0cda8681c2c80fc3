"""Encoders of a user's own: what is asked of them, checked on made-up images before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PartError
from ..parts import Part, run

IMAGES = 2


def build_own_encoder(
    part: Part, in_channels: int, image_size: int, out_dim: int | None, options: Mapping[str, Any] | None
) -> nn.Module:
    """The nn.Module that the part returns for these arguments: images float32 [N, C, S, S] -> [N, feature_dim].

    Its attribute `feature_dim` is an int, and `out_dim` where that is given. Where it has `output_layers`, the names
    of the layers that map to `out_dim`, they are kept. Raises PartError.
    """
    encoder = part.build(options, in_channels=in_channels, image_size=image_size, out_dim=out_dim)
    if not isinstance(encoder, nn.Module):
        raise PartError(f"{part.where}: returned {type(encoder).__name__}, not a torch.nn.Module")
    width: Any = getattr(encoder, "feature_dim", None)
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise PartError(
            f"{part.where}: its attribute feature_dim is {width!r}: set it to the size of its features, an int"
        )
    if out_dim is not None and width != out_dim:
        raise PartError(
            f"{part.where}: model.out_dim={out_dim}, but its feature_dim is {width}: make it return out_dim "
            "features, or use model.out_dim=null"
        )
    _check_output(part, encoder, (IMAGES, in_channels, image_size, image_size), width)
    own: Any = encoder
    own.stem_kind, own.output_layers = "own", tuple(getattr(encoder, "output_layers", ()))
    return encoder


@torch.no_grad()
def _check_output(part: Part, encoder: nn.Module, shape: tuple[int, ...], width: int) -> None:
    """Raise PartError unless the encoder maps images of this shape to features. Leaves weights, statistics and random
    generators as they are."""
    modes = [(module, module.training) for module in encoder.modules()]
    with torch.random.fork_rng(devices=[]):
        features = run(part.where, encoder.eval(), torch.zeros(shape))
    for module, mode in modes:
        module.training = mode
    if not isinstance(features, Tensor) or tuple(features.shape) != (shape[0], width):
        found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise PartError(
            f"{part.where}: maps images {list(shape)} to {found}, not to {[shape[0], width]}, [N, feature_dim]"
        )
    if not features.is_floating_point():
        raise PartError(f"{part.where}: its features are {features.dtype}, not floating point")
