"""A stage in a process that goes on afterwards, such as a notebook's: nothing of it is left behind."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from .. import known_names
from ..config import Config, Stage
from ..distributed.launch import Runtime
from ..errors import ConfigError
from ..stages.start import started
from ..training.data import Data
from .objects import named_in

_running: list[str] = []
"""The function that runs a stage, if any."""
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def running(
    function: str,
    config: Config,
    stages: tuple[Stage, ...],
    command: Mapping[str, object],
    *,
    resume: bool = True,
    folder: Path | None = None,
    of_run: Config | None = None,
) -> Iterator[tuple[Runtime, Data]]:
    """As `started`, for `hs.FUNCTION`. Afterwards the process is as before: random generators, threads, numerics,
    signal handlers, and no process group. Raises ConfigError inside of another stage, such as in a callback."""
    if _running:
        raise ConfigError(f"hs.{function} was called while hs.{_running[0]} runs: call it when that has ended")
    _running.append(function)
    facts = {"command": f"hs.{function}", **command}
    try:
        with (
            unchanged_process(),
            # what a folder names is read, to be compared; nothing of it is imported for that
            known_names.given({}, named_in(folder or config.folder)),
            started(config, stages, facts, resume=resume, folder=folder, of_run=of_run) as (runtime, data),
        ):
            yield runtime, data
    finally:
        _running.clear()


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Restores at the end what a stage sets for its whole process: see `running`."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get(CUBLAS)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(CUBLAS, None)
