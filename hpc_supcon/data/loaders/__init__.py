"""Loaders by name. All serve the same `Batch` in the same order; they differ in where the images wait."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from importlib.util import find_spec

import torch

from ...distributed.collectives import all_sum
from ...errors import ConfigError, unknown_name
from ..order import Order
from ..sources.beton import BetonSource
from ..sources.folder import FolderSource
from ..sources.source import ArraySource, Source
from .base import CropOptions, Loader, LoaderOptions, OnCorrupt, Steps
from .dali import DaliLoader
from .ffcv import FfcvLoader
from .resident import ResidentLoader
from .torch_workers import TorchLoader

__all__ = ["LOADERS", "CropOptions", "LoaderOptions", "OnCorrupt", "build_loader", "choose", "replaced_everywhere"]

LOADERS: dict[str, Callable[[Source, Steps, torch.device | str, LoaderOptions], Loader]] = {
    "resident": ResidentLoader,
    "torch": TorchLoader,
    "ffcv": FfcvLoader,
    "dali": DaliLoader,
}
"""`data.loader` -> a loader over a source that serves these steps on this device."""

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

    Raises ConfigError for an unknown name and for an order that does not fit the ranks, MissingExtra, and what
    the loader itself raises (DataError, CorruptSample).
    """
    options = options or LoaderOptions()
    if name == "auto":
        name, reason = choose(source, device, options)
        if rank == 0:
            _log.info("data.loader=auto takes %s: %s", name, reason)
    if name not in LOADERS:
        raise ConfigError(unknown_name("data.loader", name, ["auto", *LOADERS]))
    assert order.n == len(source)
    return LOADERS[name](source, Steps(order, seed, rank, world_size), device, options)


def replaced_everywhere(loader: Loader, device: torch.device | str = "cpu") -> int:
    """Images replaced so far on all ranks together, the same number on every rank. Collective.

    device: one that the process group can send from (NCCL: the rank's GPU).
    """
    return int(all_sum(torch.tensor(loader.replaced, device=device)))


def choose(source: Source, device: torch.device | str, options: LoaderOptions) -> tuple[str, str]:
    """(name, reason) of the loader that `auto` takes: the fastest one that fits."""
    device = torch.device(device)
    size, free = len(source) * source.channels * source.image_size**2, _free_memory(device)
    needs = f"{size / 2**30:.2f} GiB as uint8, {free / 2**30:.1f} GiB free on {device}"
    in_memory = isinstance(source, ArraySource)
    if in_memory and (size < free * RESIDENT_SHARE or device.type == "cpu"):
        return "resident", f"the images are in memory already ({needs})"
    if options.crop is None and not in_memory and size < free * RESIDENT_SHARE:
        return "resident", f"the set fits into memory ({needs})"
    why = f"the set does not fit into memory ({needs})"
    if options.crop is not None and not in_memory:
        why = "crops are taken from the images as they are stored"
    if isinstance(source, BetonSource) and find_spec("ffcv") is not None:
        return "ffcv", f"{why}, in a .beton file"
    if isinstance(source, FolderSource) and device.type == "cuda" and _has_dali():
        return "dali", f"{why}, in files that the GPU decodes"
    return "torch", why


def _has_dali() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
