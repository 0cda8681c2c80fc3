"""Device, memory layout, number format, compilation and data-parallel wrapper of a model."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...distributed.launch import Runtime, has_fast_bf16
from ...models import synchronize_batchnorm
from .base import Compile

M = TypeVar("M", bound=nn.Module)


def place(model: M, runtime: Runtime, *, channels_last: bool = False, sync_bn: bool = False) -> M:
    """Move `model` to this rank's device, and to the memory layout.

    sync_bn: make BatchNorm span all ranks already here, for a model that is copied before `distribute`.
    """
    layout = torch.channels_last if channels_last else torch.preserve_format
    placed = model.to(runtime.device).to(memory_format=layout)
    if sync_bn and runtime.world_size > 1:
        synchronize_batchnorm(placed, runtime.device)
    return placed


def distribute(model: nn.Module, runtime: Runtime, *, sync_bn: bool) -> nn.Module:
    """Wrap `model` for data-parallel training: gradients are averaged over ranks in backward."""
    if runtime.world_size == 1:
        return model
    options: dict[str, Any] = {"gradient_as_bucket_view": True}
    if runtime.device.type == "cuda":
        options["device_ids"] = [runtime.device]
    if torch.are_deterministic_algorithms_enabled() and runtime.world_size > 2:
        # Otherwise DDP rebuilds its buckets in the second step of a process, in the order in which gradients became
        # ready in the first one. The order in which an all-reduce of three or more ranks adds depends on the position
        # in a bucket, so that the first step after a resume would round differently.
        options["find_unused_parameters"] = True
    if sync_bn:
        model = synchronize_batchnorm(model, runtime.device)  # changes nothing after `place` with sync_bn
        options[_BUFFER_SYNC] = False  # synchronized statistics are equal on all ranks
    return DistributedDataParallel(model, **options)


# renamed in PyTorch 2.15
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_BUFFER_SYNC = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The number format of the forward pass: `auto` is bf16 where the device computes it natively, else fp32.

    Training in `fp16` needs a scaled loss (see LossScale).
    """
    if precision == "fp16":
        return torch.autocast(device.type, dtype=torch.float16)
    if precision == "bf16" or (precision == "auto" and has_fast_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def unscaled(precision: str) -> str:
    """`precision` for training without loss scaling: `auto` in place of fp16."""
    return "auto" if precision == "fp16" else precision


def compiler(*, enabled: bool, cuda_graphs: bool) -> Compile:
    """A function that compiles the forward pass of a module; the module itself stays as it is.

    Every shape is compiled by itself (`dynamic=False`): training has one, or two where the last piece of a batch is
    smaller. cuda_graphs: replay the pass as CUDA graphs, which need shapes that never change.
    """
    if not enabled:
        return lambda call: call
    if not cuda_graphs:
        return lambda call: torch.compile(call, dynamic=False)

    def graphed(call: Any) -> Any:
        replay = torch.compile(call, dynamic=False, mode="reduce-overhead")

        def run(*args: Any) -> Any:
            # the outputs of the last step's graphs may be overwritten from here on
            torch.compiler.cudagraph_mark_step_begin()
            return replay(*args)

        return run

    return graphed
