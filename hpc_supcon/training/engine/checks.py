"""From the configuration to an engine, and what the engine needs of this machine."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from ...config import Config
from ...distributed.launch import Runtime
from ...errors import ConfigError, MissingExtra


def check_engine(config: Config, runtime: Runtime) -> None:
    """Raise ConfigError where this machine has no device or compiler for the settings of `train`, MissingExtra."""
    train = config.train
    if train.precision == "fp16" and runtime.device.type != "cuda":
        raise ConfigError("train.precision=fp16 needs a CUDA device; use bf16 or fp32 on the CPU")
    if train.cuda_graphs and runtime.device.type != "cuda":
        raise ConfigError("train.cuda_graphs=true needs a CUDA device")
    if train.engine == "deepspeed" and find_spec("deepspeed") is None:
        raise MissingExtra(
            "train.engine=deepspeed needs DeepSpeed; install it with: pip install 'hpc-supcon[deepspeed]'"
        )
    if train.compile:
        _check_compiler(runtime)


def _check_compiler(runtime: Runtime) -> None:
    # Triton's launchers are C, everything on the CPU is C++
    known = ("gcc", "clang") if runtime.device.type == "cuda" else ("g++", "clang++")
    chosen = os.environ.get("CC" if runtime.device.type == "cuda" else "CXX")
    if shutil.which(chosen or known[0]) is None and (chosen or shutil.which(known[1]) is None):
        raise ConfigError(
            f"train.compile=true needs a compiler, and {chosen or ' or '.join(known)} is not on PATH; install one, "
            "or use train.compile=false"
        )
