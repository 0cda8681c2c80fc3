"""Which device `hpc-supcon bench gpu` measures, and whether it can: asked in another process.

This one never uses the GPU: its context would take memory from the stages, and keep them out where the GPU is set to
one process at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from ...errors import ConfigError

KINDS = ("auto", "cpu", "cuda")
CAPABILITY = (8, 0)
"""Of the Triton kernels."""
LEAST_FREE = 4 << 30
"""Bytes that must be free; single measurements that need more are skipped."""
_ASK = """
import json, torch
found = {"cuda": torch.cuda.is_available(), "torch": torch.__version__}
if found["cuda"]:
    free, whole = torch.cuda.mem_get_info()
    found |= {"name": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
              "free": free, "whole": whole}
print(json.dumps(found))
"""


def check_device(name: str) -> str:
    """cpu or cuda, for auto, cpu or cuda. Raises ConfigError where that GPU cannot be measured."""
    if name not in KINDS:
        raise ConfigError(f"--device is {name}; use auto, cpu or cuda")
    if name == "cpu":
        return "cpu"
    found = ask()
    if not found["cuda"] and name == "auto":
        return "cpu"
    check_gpu(found)
    return "cuda"


def ask() -> dict[str, Any]:
    """What PyTorch says of the GPU. Raises ConfigError with the last line of the error where it says nothing."""
    done = subprocess.run([sys.executable, "-c", _ASK], check=False, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"PyTorch cannot use the GPU: {last}; see nvidia-smi, or use --device cpu")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def check_gpu(found: dict[str, Any]) -> None:
    """Raise ConfigError unless the GPU that `ask` found can be measured."""
    if not found["cuda"]:
        raise ConfigError(
            f"--device cuda, but PyTorch {found['torch']} sees no CUDA device; see nvidia-smi, or use --device cpu"
        )
    capability = tuple(found["capability"])
    if capability < CAPABILITY:
        raise ConfigError(
            f"{found['name']} has compute capability {capability[0]}.{capability[1]}, and the kernels need "
            f"{CAPABILITY[0]}.{CAPABILITY[1]} or later; choose another GPU with CUDA_VISIBLE_DEVICES, or --device cpu"
        )
    if found["free"] < LEAST_FREE:
        raise ConfigError(
            f"{found['name']} has {found['free'] / 2**30:.1f} of {found['whole'] / 2**30:.1f} GiB free, the rest is "
            "held by other processes (see nvidia-smi); end them, or choose another GPU with CUDA_VISIBLE_DEVICES"
        )
