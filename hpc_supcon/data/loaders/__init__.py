"""Loaders by name. All serve the same `Batch` in the same order; they differ in where the images wait."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...errors import ConfigError, unknown_name
from ..batch import Loader
from ..order import Order
from ..sources import Source
from .resident import ResidentLoader

LOADERS: dict[str, Callable[..., Loader]] = {
    "resident": ResidentLoader,
}


def build_loader(
    name: str,
    source: Source,
    order: Order,
    *,
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device | str,
) -> Loader:
    """The loader called `name` for this rank; `auto` takes the fastest one that fits, today `resident`.

    Raises ConfigError for an unknown name, and what the loader itself raises (DataError, CorruptSample).
    """
    if name == "auto":
        name = "resident"
    if name not in LOADERS:
        raise ConfigError(unknown_name("data.loader", name, ["auto", *LOADERS]))
    return LOADERS[name](source, order, seed=seed, rank=rank, world_size=world_size, device=device)
