"""Run a function on several real gloo ranks and return what each of them returned."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.processes import FORK_SERVER, RUN_TIMEOUT_S


def _one_rank(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=RUN_TIMEOUT_S),
        )
    try:
        result: Any = fn(rank, world_size, *args)
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        raise
    torch.save(result, Path(folder, f"result-{rank}"))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, environment: Mapping[str, str] | None = None
) -> list[Any]:
    """`fn(rank, world_size, *args)` in `world_size` processes; their return values in rank order.

    `fn` must be a module-level function. A world of one has no process group. The first rank that
    fails has its traceback raised here. `environment`: variables that are read when a module is imported; the ranks
    are then new interpreters, which import everything anew.
    """
    method = FORK_SERVER.get_start_method() if environment is None else "spawn"
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, environment or {}):
        try:
            mp.start_processes(
                _one_rank,
                args=(world_size, folder, fn, args),
                nprocs=world_size,
                start_method=method,
            )
        except Exception as error:
            tracebacks = [p.read_text() for p in sorted(Path(folder).glob("error-*"))]
            raise AssertionError("\n".join(tracebacks) or str(error)) from None
        return [torch.load(Path(folder, f"result-{r}"), weights_only=False) for r in range(world_size)]
