"""Out of memory: which setting to change, and to what value, from a measurement of the model."""

from __future__ import annotations

import os
import resource
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..allocator import release_freed_memory
from ..data import Batch
from ..distributed.collectives import world_size
from ..errors import OutOfMemory
from .state import StepOptions, TrainState

GIB = 2**30
SHARE = {"cuda": 0.9, "cpu": 0.6}
"""The share of the memory that a proposal may take: fragmentation and library workspaces are not measured. On a CPU,
keeping freed memory for the next step was seen to make a process hold 1.7 times as much."""
SAMPLES = (2, 4)
"""Numbers of images at which memory is measured; a line through both gives it at other numbers."""


@contextmanager
def memory_advice(state: TrainState, batch: Batch, options: StepOptions) -> Iterator[None]:
    """Raises OutOfMemory, which says what to set instead, when a step on `batch` inside runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # their variables hold the tensors of the step
        raise OutOfMemory(_advice(state, batch, options)) from None


def is_out_of_memory(error: BaseException) -> bool:
    """On CUDA there is an error class for it; on the CPU it is a RuntimeError like any other."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text or "can't allocate memory" in text or "CUDA out of memory" in text


@dataclass(frozen=True)
class Estimate:
    """Bytes of a step as a function of the number of images n in one forward pass: `fixed + per_image n`."""

    fixed: float
    per_image: float

    def of(self, images: int) -> float:
        return self.fixed + self.per_image * images

    def images(self, limit: float) -> int:
        """The largest power of two that needs at most `limit` bytes, 0 where none does."""
        most = int((limit - self.fixed) // self.per_image) if limit > self.fixed else 0
        return 2 ** (most.bit_length() - 1) if most else 0


def estimate(state: TrainState, batch: Batch, options: StepOptions, used: int) -> Estimate:
    """Measured on this rank alone, by forward and backward passes over a few images; `used`: bytes in use now."""
    low, high = (min(n, len(batch.images)) for n in SAMPLES)
    at_low, at_high = (peak_bytes(state, batch, options, n) for n in (low, high))
    per_image = (at_high - at_low) / (high - low) if high > low else at_low / low
    return Estimate(used + at_low - per_image * low, max(per_image, 1.0))


def peak_bytes(state: TrainState, batch: Batch, options: StepOptions, images: int) -> int:
    """Most bytes alive at once while gradients for the first `images` of `batch` are computed; they are not stored.

    In evaluation mode, which keeps the same activations but computes no statistics over ranks: not collective.
    """
    weights = [p for p in state.model.parameters() if p.requires_grad]
    training = state.model.training
    state.model.eval()
    try:
        with _LiveBytes() as live:
            own = batch.images[:images]
            x = state.views(own)
            with options.autocast():
                outputs = state.model(x)
            total = torch.stack([out.float().sum() for out in outputs.values()]).sum()
            torch.autograd.grad(total, weights, allow_unused=True)
    finally:
        state.model.train(training)
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that were made inside, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in before | self._known:
                self._add(t.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def used_and_limit(device: torch.device) -> tuple[int, int]:
    """(bytes that this process uses on `device`, bytes that it could use at most)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        used = torch.cuda.memory_allocated(device)
        return used, torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    release_freed_memory()
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    virtual, used = (int(n) * os.sysconf("SC_PAGE_SIZE") for n in pages[:2])
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    limit = used + next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    return used, limit if allowed == resource.RLIM_INFINITY else min(limit, used + max(0, allowed - virtual))


def _advice(state: TrainState, batch: Batch, options: StepOptions) -> str:
    used, limit = used_and_limit(state.device)
    images = min(options.micro_batch_size or len(batch.images), len(batch.images))
    where = f"step {state.step}: out of memory on {state.device} with {images} images in one pass"
    try:
        found = estimate(state, batch, options, used)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return f"{where}: not even {SAMPLES[1]} fit; take a smaller model.encoder, or smaller images"
    where += f" (about {_gib(found.of(images))} of {_gib(limit)})"
    # less than what was too large just now, whatever the estimate says
    piece = min(
        found.images(SHARE[state.device.type] * limit), 2 ** ((images - 1).bit_length() - 1) if images > 1 else 0
    )
    if piece < 1:
        return (
            f"{where}: not even one fits; set train.activation_checkpointing=true, or take a smaller model.encoder "
            "or smaller images"
        )
    how = f"about {_gib(found.of(piece))}"
    if state.engine.can_accumulate and "decoder" not in state.objective.heads:
        return f"{where}; set train.micro_batch_size={piece} ({how})"
    whole = piece * world_size()
    return f"{where}; set data.batch_size={whole} ({how}), or train.activation_checkpointing=true"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
