"""Stage machine: versions, what is not installed, how fast memory is copied and matrices are multiplied."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from ..common import is_installed, machine, matmul_rate, seconds_of
from .work import Work

PACKAGES = ("torchvision", "timm", "triton", "numpy", "pydantic", "torchmetrics", "safetensors", "scikit-learn")
OPTIONAL = {
    "ffcv": "the loader ffcv",
    "nvidia.dali": "the loader dali",
    "deepspeed": "train.engine=deepspeed",
    "submitit": "grids under Slurm",
    "tensorboard": "TensorBoard events",
    "pytorch_metric_learning": "the loss's contender pml",
    "pytest": "the tests",
}
"""Module -> what needs it."""


def run(work: Work) -> None:
    about = machine(work.kind)
    work.record.fact(**about, cores=os.cpu_count(), kernel=platform.release(), packages=_versions())
    for module, what in OPTIONAL.items():
        if not is_installed(module):
            work.skip(what, f"{module} is not installed")
    if not any(map(shutil.which, ("gcc", "clang"))):
        work.skip("Triton's kernels and torch.compile", "neither gcc nor clang is on PATH")
    if work.kind == "cuda":
        work.record.fact(**_gpu(work.device))
    with work.measuring("copies"):
        for what, rate in _copies(work.device).items():
            work.record.row("ceilings", what=what, rate=rate, unit="GB/s")
    for name, dtype, precision in _products(work.kind):
        with work.measuring(f"products of {name}"):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            rate = matmul_rate(work.kind, dtype)
            torch.set_float32_matmul_precision(before)
            work.record.row("ceilings", what=f"matrix product, {name}", rate=rate, unit="TFLOP/s")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _gpu(device: torch.device) -> dict[str, object]:
    properties, (free, whole) = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info(device)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(whole / 2**30, 1),
        "memory_free_gib": round(free / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none",
    }


def _products(kind: str) -> list[tuple[str, torch.dtype, str]]:
    """(name, dtype, PyTorch's precision of float32 products)."""
    if kind == "cpu":
        return [("fp32", torch.float32, "highest")]
    return [
        ("bf16", torch.bfloat16, "highest"), ("tf32", torch.float32, "high"), ("fp32", torch.float32, "highest"),
    ]  # fmt: skip


def _copies(device: torch.device) -> dict[str, float]:
    """GB/s; within the device, bytes read and written count."""
    size = 64 << 20 if device.type == "cpu" else 2 << 30
    here = torch.empty(size, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    copies: dict[str, tuple[int, Callable[[], object]]] = {"copy within": (2 * size, lambda: there.copy_(here))}
    if device.type == "cuda":
        pinned = torch.empty(size // 8, dtype=torch.uint8, pin_memory=True)
        part = here[: size // 8]
        copies["host to device, pinned"] = (size // 8, lambda: part.copy_(pinned, non_blocking=True))
        copies["device to host, pinned"] = (size // 8, lambda: pinned.copy_(part, non_blocking=True))
    rates = {}
    for what, (count, copy) in copies.items():
        copy()
        rates[what] = count / seconds_of(copy, device) / 1e9
    return rates
