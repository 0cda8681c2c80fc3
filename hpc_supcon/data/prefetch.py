"""On the way to the device: the next batch is copied while the current one is computed on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .batch import Batch


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; what runs there already is not waited for."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device, non_blocking=True)
    # The caching host allocator keeps pinned memory until the copy out of it is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def to_device(batches: Iterator[Batch], device: torch.device | str) -> Iterator[Batch]:
    """The batches, on `device`.

    On CUDA the next batch is copied from pinned memory on a stream of its own while the caller works on the
    current one. Elsewhere there is nothing to copy, and batches pass through: loaders decode ahead themselves.
    """
    return _overlapped(batches, torch.device(device)) if torch.device(device).type == "cuda" else batches


def _overlapped(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    side = torch.cuda.Stream(device)
    waiting = _copy(next(batches, None), device, side)
    while waiting is not None:
        ready, waiting = waiting, None
        # The order matters: `ready` is waited for before the next copy is queued on the same stream.
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for tensor in (ready.images, ready.labels, ready.index):
            tensor.record_stream(current)  # its memory belongs to the side stream's pool
        waiting = _copy(next(batches, None), device, side)
        yield ready


def _copy(batch: Batch | None, device: torch.device, side: torch.cuda.Stream) -> Batch | None:
    if batch is None:
        return None
    with torch.cuda.stream(side):
        images, labels, index = (sent(tensor, device) for tensor in (batch.images, batch.labels, batch.index))
    return Batch(images, labels, index)
