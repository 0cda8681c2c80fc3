"""The views that training would compute, to be looked at before it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..config import Config, load_config
from ..data import MultiCrop, full_scale
from ..errors import ConfigError
from ..seeding import stream
from ..terminal import warn
from ..training.build import build_views, describe_model
from ..training.data import splits_of
from .objects import Objects, SourceObject, given
from .settings import Settings, overrides_of, recipe_of


def views(
    config: str | Path | Settings | Config = "quickstart",
    *,
    settings: Settings | None = None,
    source: SourceObject | None = None,
    images: int = 8,
) -> Tensor:
    """Some training images beside the augmented views of them that a run of this configuration would train on.

    If a person no longer sees in the views what tells the images apart, an encoder does not either. Nothing is
    trained, and no run folder is made. This is the work of one process, also under torchrun.

    Args:
        config, settings, source: as of `hs.pretrain`.
        images: how many, evenly spread over the training images.

    Returns:
        float32 [images, 1 + V, C, S, S] in 0..1 of full scale, on the CPU: each image as evaluation reads it, then
        its V = `data.views` views; of multi-crop the global ones.

    Raises:
        ConfigError: a setting or an object is wrong.
        DataError: the images are missing, damaged or of another form.

    Source:
        How the choice of views decides what is learned: Chen et al. 2020 (arXiv 2002.05709), section 3.
    """
    if images < 1:
        raise ConfigError(f"images={images}: must be at least 1")
    objects = Objects(source)
    with given(objects):
        recipe, changes = recipe_of(config)
        resolved = load_config(
            recipe, [*changes, *overrides_of(settings), *objects.overrides()], stages=("pretrain",)
        )
        splits = splits_of(resolved, note=warn)
        train, n = splits.train, min(images, len(splits.train))
        pixels = torch.stack([train.read(k * len(train) // n) for k in range(n)])
        made = build_views(resolved, describe_model(resolved, splits), seed=stream(resolved.seed, "views", 0, 0))
    augmented = made.parts[0] if isinstance(made, MultiCrop) else made
    with torch.no_grad():
        changed = augmented.denormalize(augmented(pixels).float()).clamp(0, 1)
    return torch.cat([pixels.unsqueeze(1).float() / full_scale(pixels.dtype), changed], dim=1)
