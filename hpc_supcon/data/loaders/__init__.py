"""Loaders by name. All serve the same `Batch` in the same order; they differ in where the images wait."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from importlib.util import find_spec

import torch

from ...errors import ConfigError, unknown_name
from ..batch import Loader
from ..beton import BetonSource
from ..order import Order
from ..sources import ArraySource, Source
from .ffcv import FfcvLoader
from .options import CropOptions, LoaderOptions, OnCorrupt
from .resident import ResidentLoader
from .torch_workers import TorchLoader

__all__ = ["LOADERS", "CropOptions", "LoaderOptions", "OnCorrupt", "build_loader", "choose"]

LOADERS: dict[str, Callable[..., Loader]] = {
    "resident": ResidentLoader,
    "torch": TorchLoader,
    "ffcv": FfcvLoader,
}

RESIDENT_SHARE = 0.5
"""A set that takes less than this share of the free memory is kept there; the rest is for training."""

_log = logging.getLogger(__name__)


def build_loader(
    name: str,
    source: Source,
    order: Order,
    *,
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device | str,
    options: LoaderOptions | None = None,
) -> Loader:
    """The loader called `name` for this rank; `auto` takes what `choose` says, and logs why on rank 0.

    Raises ConfigError for an unknown name, MissingExtra, and what the loader itself raises (DataError,
    CorruptSample).
    """
    options = options or LoaderOptions()
    if name == "auto":
        name, reason = choose(source, device, options)
        if rank == 0:
            _log.info("data.loader=auto takes %s: %s", name, reason)
    if name not in LOADERS:
        raise ConfigError(unknown_name("data.loader", name, ["auto", *LOADERS]))
    return LOADERS[name](source, order, seed=seed, rank=rank, world_size=world_size, device=device, options=options)


def choose(source: Source, device: torch.device | str, options: LoaderOptions) -> tuple[str, str]:
    """(name, reason) of the loader that `auto` takes: the fastest one that fits."""
    size = len(source) * source.channels * source.image_size**2
    free = _free_memory(torch.device(device))
    needs = f"{size / 2**30:.2f} GiB as uint8, {free / 2**30:.1f} GiB free on {device}"
    if isinstance(source, ArraySource):
        if size < free * RESIDENT_SHARE or torch.device(device).type == "cpu":
            return "resident", f"the images are in memory already ({needs})"
        return "torch", f"the images are in the host's memory and too many for the device ({needs})"
    if isinstance(source, BetonSource) and find_spec("ffcv") is not None:
        if options.crop is None and size < free * RESIDENT_SHARE:
            return "resident", f"the set fits into memory ({needs})"
        return "ffcv", "the source is a .beton file"
    if options.crop is not None:
        return "torch", "crops are taken from the stored images, which differ from what would be kept in memory"
    if size < free * RESIDENT_SHARE:
        return "resident", f"the set fits into memory ({needs})"
    return "torch", f"the set does not fit into memory ({needs})"


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
