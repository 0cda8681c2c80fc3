"""From the configuration to an engine: what does not go together is said before anything is trained."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from ...config import Config
from ...distributed.launch import Runtime
from ...errors import ConfigError, MissingExtra
from .deepspeed_settings import check_settings


def check_engine(config: Config, runtime: Runtime) -> None:
    """Raise ConfigError where settings of `train` contradict each other or this machine, MissingExtra."""
    train = config.train
    if train.precision == "fp16" and runtime.device.type != "cuda":
        raise ConfigError("train.precision=fp16 needs a CUDA device; use bf16 or fp32 on the CPU")
    if train.engine == "deepspeed":
        _check_deepspeed(config)
    elif train.deepspeed.config is not None:
        raise ConfigError("train.deepspeed.config is set, but train.engine=ddp heeds none of it")
    if train.cuda_graphs:
        _check_cuda_graphs(config, runtime)
    if train.compile:
        _check_compile(config, runtime)


def _check_deepspeed(config: Config) -> None:
    train, zero = config.train, config.train.deepspeed.zero
    check_settings(train.deepspeed.config)
    if zero == 2 and train.micro_batch_size is not None:
        raise ConfigError(
            "train.micro_batch_size with train.deepspeed.zero=2: partitioned gradients would be exchanged for every "
            "piece; use zero 0 or 1, or train.engine=ddp"
        )
    if zero and config.optim.name in ("lars", "lamb"):
        raise ConfigError(
            f"optim.name={config.optim.name} needs the norm of every weight, which train.deepspeed.zero={zero} cuts "
            "into parts; use zero 0, or train.engine=ddp"
        )
    if find_spec("deepspeed") is None:
        raise MissingExtra(
            "train.engine=deepspeed needs DeepSpeed; install it with: pip install 'hpc-supcon[deepspeed]'"
        )


def _check_cuda_graphs(config: Config, runtime: Runtime) -> None:
    train = config.train
    if runtime.device.type != "cuda":
        raise ConfigError("train.cuda_graphs=true needs a CUDA device")
    if not train.compile:
        raise ConfigError("train.cuda_graphs=true replays the compiled pass: set train.compile=true as well")
    if train.engine == "deepspeed":
        raise ConfigError("train.cuda_graphs=true: DeepSpeed changes gradients in place; use train.engine=ddp")
    images, piece = config.data.batch_size // runtime.world_size, train.micro_batch_size
    if piece is not None and images % piece:
        raise ConfigError(
            f"train.cuda_graphs=true needs one shape, but {images} images per rank in pieces of "
            f"train.micro_batch_size={piece} leave a smaller last one; use a divisor of {images}"
        )


def _check_compile(config: Config, runtime: Runtime) -> None:
    if config.train.activation_checkpointing:
        raise ConfigError(
            "train.activation_checkpointing with train.compile: the compiler chooses what to compute again; use one "
            "of them"
        )
    # Triton's launchers are C, everything on the CPU is C++
    known = ("gcc", "clang") if runtime.device.type == "cuda" else ("g++", "clang++")
    chosen = os.environ.get("CC" if runtime.device.type == "cuda" else "CXX")
    if shutil.which(chosen or known[0]) is None and (chosen or shutil.which(known[1]) is None):
        raise ConfigError(
            f"train.compile=true needs a compiler, and {chosen or ' or '.join(known)} is not on PATH; install one, "
            "or use train.compile=false"
        )
