"""Loaders by name. All yield the same `Batch`es in the same order; they differ in where the images are kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch

from ...distributed.collectives import all_sum
from ...errors import ConfigError, unknown_name
from ..levels import PICTURE_CHANNELS, bits_of, is_picture
from ..order import Order
from ..sources.beton import BetonSource
from ..sources.encoded import EncodedSource
from ..sources.folder import FolderSource
from ..sources.source import ArraySource, Source, pixel_dtype
from .base import CropOptions, EpochSteps, Loader, LoaderOptions, OnCorrupt
from .dali import DaliLoader
from .ffcv import FfcvLoader
from .resident import ResidentLoader
from .torch_workers import TorchLoader

__all__ = [
    "LOADERS",
    "CropOptions",
    "LoaderOptions",
    "OnCorrupt",
    "build_loader",
    "choose_loader",
    "replaced_on_all_ranks",
]

LOADERS: dict[str, Callable[[Source, EpochSteps, torch.device | str, LoaderOptions], Loader]] = {
    "resident": ResidentLoader,
    "torch": TorchLoader,
    "ffcv": FfcvLoader,
    "dali": DaliLoader,
}
"""`data.loader` -> a loader that loads these steps from a source onto this device."""

OF_PICTURES = ("ffcv", "dali")
"""Loaders of 8-bit gray and RGB images alone."""
RESIDENT_SHARE = 0.5
"""A set is kept on the device when it takes less than this share of the free memory; training needs the rest."""


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
    """The loader called `name` for this rank; for `data.loader=auto` see `choose_loader`.

    Raises ConfigError for an unknown name and for an order that does not fit the ranks, MissingExtra, and what
    the loader itself raises (DataError, CorruptSample).
    """
    if name not in LOADERS:
        raise ConfigError(unknown_name("data.loader", name, LOADERS))
    assert order.n == len(source)
    if name in OF_PICTURES and not is_picture(source.channels, pixel_dtype(source)):
        raise ConfigError(
            f"data.loader={name} decodes 8-bit images of {' or '.join(map(str, PICTURE_CHANNELS))} channels, but "
            f"these have {source.channels} of {bits_of(pixel_dtype(source))} bits: use data.loader=resident or torch"
        )
    return LOADERS[name](source, EpochSteps(order, seed, rank, world_size), device, options or LoaderOptions())


def replaced_on_all_ranks(loader: Loader, device: torch.device | str = "cpu") -> int:
    """Images replaced so far on all ranks together, the same number on every rank. Collective.

    device: one that the process group can send from (NCCL: the rank's GPU).
    """
    return int(all_sum(torch.tensor(loader.replaced, device=device)))


def choose_loader(source: Source, device: torch.device | str, options: LoaderOptions) -> tuple[str, str]:
    """(name, reason) of the loader that `data.loader=auto` stands for: the fastest one that fits."""
    device = torch.device(device)
    dtype, free = pixel_dtype(source), _free_memory(device)
    size = len(source) * source.channels * source.image_size**2 * dtype.itemsize
    needs = f"{size / 2**30:.2f} GiB as {str(dtype).removeprefix('torch.')}, {free / 2**30:.1f} GiB free on {device}"
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
    is_file = isinstance(source, FolderSource | EncodedSource) and is_picture(source.channels, dtype)
    if is_file and device.type == "cuda" and _has_dali():
        return "dali", f"{why}, in files that the GPU decodes"
    return "torch", why


def _has_dali() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
