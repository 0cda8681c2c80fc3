"""Shared by the benchmarks: facts about the machine, and memory in use."""

from __future__ import annotations

import platform
import subprocess
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..phases import REST, Clock


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


def seconds_of(call: Callable[[], object], device: torch.device, rounds: int = 6) -> float:
    """Seconds of the fastest of `rounds` calls, on CUDA of the device's work. Call it once before, to warm up."""
    best = float("inf")
    for _ in range(rounds):
        clock = Clock(device)
        clock.switch("call")
        call()
        clock.switch(REST)
        best = min(best, clock.read()["call"])
    return best


def matmul_rate(device: str, dtype: torch.dtype | None = None) -> float:
    """TFLOP/s of a square matmul, as the machine's peak; `dtype`: by default fp32, bf16 on CUDA."""
    size, usual = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a = torch.randn(size, size, device=device, dtype=dtype or usual)
    return 2 * size**3 / seconds_of(lambda: a @ a, a.device) / 1e12


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


def is_installed(module: str) -> bool:
    """Whether a package (or, with a dot, a package in it) can be found; it is not imported."""
    package = module.partition(".")[0]
    return find_spec(package) is not None and find_spec(module) is not None


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
