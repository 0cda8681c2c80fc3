"""The start of a process that computes: its rank, device, threads and process group."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..allocator import keep_freed_memory
from ..environment import CONCURRENT_RUNS, ports_from
from ..errors import HpcSupconError, RankLost, RanksApart, first_line
from . import collectives
from .agreement import compare_ranks
from .devices import choose_device, own_view
from .rendezvous import START_TIMEOUT_S, Meeting, meet
from .resolve import Launch, integer_of, resolve

__all__ = [
    "Launch",
    "Runtime",
    "fair_threads",
    "has_fast_bf16",
    "meet_ranks",
    "meeting_of",
    "refused",
    "resolve",
    "set_collective_timeout",
    "start",
]


REFUSAL_TIMEOUT_S = 60.0
"""How long a rank that cannot start waits for the others, which import for seconds, to hear of it."""


@dataclass(frozen=True)
class Runtime:
    """A Launch with its device. `is_main` is true on rank 0, the only one that writes files and log lines.

    Functions that are given a Runtime take rank and world size from it. Functions that are not (losses, metrics)
    ask the process group through collectives.rank() and world_size(); `start` asserts that both agree.
    """

    launch: Launch
    device: torch.device

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def is_main(self) -> bool:
        return self.launch.rank == 0


def meeting_of(launch: Launch) -> Meeting:
    """Where the ranks of a launch meet."""
    ports = ports_from(launch.master_port) if launch.may_move else [launch.master_port]
    run = f"{launch.run} {launch.world_size}"
    return Meeting(launch.rank, launch.world_size, launch.master_addr, ports, run, launch.agent_store)


def meet_ranks(launch: Launch, device: str, timeout_s: float, facts: Mapping[str, str]) -> tuple[Any, torch.device]:
    """(the store of the run, this rank's device). Collective.

    Raises, the same on every rank: RanksDiffer where ranks have other `facts`, or another `device`; LaunchError and
    ConfigError.
    """
    store, views = meet(meeting_of(launch), json.dumps(own_view(device)), timeout_s)
    everything = {**facts, "runtime.device": device}
    compare_ranks(store, launch.rank, launch.world_size, everything, timeout_s=timeout_s)
    return store, choose_device(device, launch.rank, [json.loads(view) for view in views])


def refused(launch: Launch, error: HpcSupconError) -> HpcSupconError:
    """The error to raise on this rank, which cannot start because of `error`, and on all others.

    The others may have no such error, and would wait for this rank. They hear of it where they compare their facts;
    where they do not come in time, this rank ends alone.
    """
    if launch.world_size == 1:
        return error
    try:
        store, _ = meet(meeting_of(launch), json.dumps([]), REFUSAL_TIMEOUT_S)
        compare_ranks(store, launch.rank, launch.world_size, {}, timeout_s=REFUSAL_TIMEOUT_S, error=error)
    except HpcSupconError as common:
        if not isinstance(common, RankLost | RanksApart):
            return common
    except (RuntimeError, ValueError, OSError):
        pass  # the others are not there: what they would say of it is of no use
    error.of_this_rank = True
    return error


def _start_group(launch: Launch, store: Any, device: torch.device, timeout_s: float) -> None:
    store.set_timeout(timedelta(seconds=timeout_s))
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:  # of gloo, NCCL and the store
        raise RanksApart(
            f"rank {launch.rank} on {socket.gethostname()}, {device}: the {launch.world_size} ranks met but cannot "
            f"communicate: {first_line(error)}; see that each task has a GPU of its own, and which network NCCL and "
            "gloo use (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        ) from error


@contextmanager
def start(
    launch: Launch | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    timeout_s: float = 600.0,
    start_timeout_s: float = START_TIMEOUT_S,
    deterministic: bool = False,
    reuse_memory: bool = False,
    facts: Mapping[str, str] | None = None,
) -> Iterator[Runtime]:
    """Set up this process: device, threads, memory, determinism, and a process group when there are several ranks
    (nccl for CUDA tensors, gloo for CPU tensors). The process group is destroyed when the block ends.

    launch: None: as the environment says. timeout_s: of its collectives; start_timeout_s: how long the ranks wait
    for each other. facts: what all ranks must have in common, by name. Raises RanksDiffer on all of them where they
    have not, before the process group is made; LaunchError and ConfigError.
    """
    launch = resolve() if launch is None else launch
    store, chosen = None, choose_device(device) if launch.world_size == 1 else None
    if chosen is None:
        store, chosen = meet_ranks(launch, device, start_timeout_s, facts or {})
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif reuse_memory:
        keep_freed_memory()
    # not OMP_NUM_THREADS, which torchrun sets to 1: sharing the cores among the ranks of this node is faster
    torch.set_num_threads(threads or fair_threads(launch))
    set_numerics(deterministic)
    if store is not None:
        _start_group(launch, store, chosen, timeout_s)
    assert (collectives.rank(), collectives.world_size()) == (launch.rank, launch.world_size)
    try:
        yield Runtime(launch, chosen)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fair_threads(launch: Launch, env: Mapping[str, str] | None = None, cores: int | None = None) -> int:
    """CPU threads for this rank. Defaults: `env` os.environ, `cores` those that this process may run on.

    All ranks and runs of the node together get no more threads than cores: with one more, every parallel loop
    waits for a thread that has no core, which halves the speed.
    """
    env = os.environ if env is None else env
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if launch.launcher == "slurm":
        # a task's cores are its own, whether or not Slurm binds the process to them
        if "SLURM_CPUS_PER_TASK" in env:
            return max(1, min(cores, integer_of(env, "SLURM_CPUS_PER_TASK")) // _concurrent_runs(env))
        if "SLURM_CPUS_ON_NODE" in env and cores < integer_of(env, "SLURM_CPUS_ON_NODE"):
            return max(1, cores // _concurrent_runs(env))
    return max(1, cores // (launch.local_world_size * _concurrent_runs(env)))


def _concurrent_runs(env: Mapping[str, str]) -> int:
    return max(1, integer_of(env, CONCURRENT_RUNS)) if CONCURRENT_RUNS in env else 1


def set_collective_timeout(seconds: float) -> None:
    """Set the timeout of the collectives that begin from now on."""
    # set_timeout is public since PyTorch 2.15, which warns about the older name
    change = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    change(timedelta(seconds=seconds), dist.group.WORLD)


def set_numerics(deterministic: bool) -> None:
    """How this process computes: with deterministic algorithms alone, in full fp32; or with the fastest convolutions
    and TF32 products. For training and for what measures it. Before the first use of CUDA."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_float32_matmul_precision("highest" if deterministic else "high")


def has_fast_bf16(device: torch.device) -> bool:
    """True where training in bf16 is faster than in fp32: on GPUs since Ampere, on CPUs with AMX.

    With AVX-512's bf16 instructions alone the forward pass is faster, but the backward pass of convolutions takes
    two to three times as long as in fp32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0]
    except OSError:
        return False
    return "amx_bf16" in flags
