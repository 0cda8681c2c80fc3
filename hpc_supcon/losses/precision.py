"""loss.precision: the number format in which the contrastive losses multiply embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PRECISIONS = ("auto", "bf16", "tf32", "fp32")
_HALF = (torch.bfloat16, torch.float16)


def tile_precision(precision: str, features: Tensor) -> str:
    """`precision`, with "auto" replaced: bf16 for half-precision features and under autocast, else tf32."""
    if precision != "auto":
        return precision
    device = features.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) in _HALF
    return "bf16" if half or features.dtype in _HALF else "tf32"


@contextmanager
def float32_products(precision: str | None) -> Iterator[None]:
    """PyTorch's own products of fp32 matrices on CUDA: "fp32" exact, "tf32" fast; None: as the process has it."""
    if precision is None:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
