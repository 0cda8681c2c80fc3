"""A source of random images."""

from __future__ import annotations

import torch

from hpc_supcon.data import ArraySource


def arrays(n: int = 50, channels: int = 3, size: int = 6, classes: int = 3) -> ArraySource:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)
    return ArraySource(images, torch.arange(n) % classes, [str(c) for c in range(classes)])
