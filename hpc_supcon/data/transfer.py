"""From the host to the device, without the host waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` (on the CPU, or there already) on `device`, in the order of its current stream.

    From pageable memory the host would wait for all work that the device has been given; the caching host
    allocator keeps pinned memory until the copy out of it is done.
    """
    if torch.device(device).type == "cuda" and not values.is_cuda:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
