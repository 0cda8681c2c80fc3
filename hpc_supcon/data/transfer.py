"""Copies to the device that do not make the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_async(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without waiting for the work that is queued there."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device, non_blocking=True)
    # The caching host allocator does not reuse pinned memory before the copy out of it is done.
    return tensor.pin_memory().to(device, non_blocking=True)
