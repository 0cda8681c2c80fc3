"""Shared by the benchmarks: facts about the machine, and memory in use."""

from __future__ import annotations

import platform
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def synchronize(z: Tensor) -> None:
    """Wait until the device of z has done all its work."""
    if z.is_cuda:
        torch.cuda.synchronize(z.device)


def host_waits(call: Callable[[], object], device: torch.device) -> int | None:
    """How often the host waits for the device during `call`, as PyTorch notices it; None where it never can (CPU)."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def matmul_rate(device: str) -> float:
    """TFLOP/s of a square matmul in fp32 (bf16 on CUDA), as the machine's peak."""
    size, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        synchronize(a)
        start = time.perf_counter()
        a @ a
        synchronize(a)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def machine(device: str) -> dict[str, Any]:
    """Facts about the machine and its software; `device`: cpu or cuda."""
    names = subprocess.run(["lscpu"], check=False, capture_output=True, text=True).stdout.splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in names if line.startswith("Model name")), platform.machine()
    )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matmul_tflops": matmul_rate(device),
    }


def resident(field: str) -> int:
    """VmRSS, VmHWM (its high-water mark) or VmData of this process, in bytes."""
    return _kilobytes(Path("/proc/self/status"), field)


def memory_available() -> int:
    """Bytes that are still free for processes of this machine."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def _kilobytes(file: Path, field: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{file} has no {field}")
