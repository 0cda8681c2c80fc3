"""From environment variables to a process's rank, device, threads and process group.

One resolver for torchrun, Slurm's srun and a single process. A partial or contradictory environment is an
error: it never silently becomes a world size of 1, which would train N independent copies of the run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..allocator import keep_freed_memory
from ..environment import CONCURRENT_RUNS, TORCHRUN, port_of_job
from ..errors import ConfigError, LaunchError
from . import collectives


@dataclass(frozen=True)
class Launch:
    """This process is `rank` of `world_size`, and `local_rank` of `local_world_size` on its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    launcher: str = "single"


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


def resolve(env: Mapping[str, str] | None = None) -> Launch:
    """Read the launch from environment variables (default: os.environ). Raises LaunchError."""
    env = os.environ if env is None else env
    in_step = "SLURM_STEP_ID" in env and "SLURM_PROCID" in env
    # MASTER_ADDR and MASTER_PORT alone are often exported in shells and say nothing about ranks
    if any(name in env for name in TORCHRUN[:3]):
        launch = _from_torchrun(env)
        if in_step and "TORCHELASTIC_RUN_ID" not in env:
            step = (_integer(env, "SLURM_PROCID"), _step_tasks(env))
            if step != (launch.rank, launch.world_size):
                raise LaunchError(
                    f"RANK={launch.rank} of WORLD_SIZE={launch.world_size} contradicts srun's task {step[0]} of "
                    f"{step[1]}; unset RANK and WORLD_SIZE, or start torchrun inside the step"
                )
        return launch
    if in_step:
        return _from_slurm(env)
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        raise LaunchError(
            f"this job has SLURM_NTASKS={env['SLURM_NTASKS']} but was not started by srun, so only one task would "
            "run; write `srun hpc-supcon ...` in the batch script"
        )
    return Launch()


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    missing = [name for name in TORCHRUN if name not in env]
    if missing:
        present = [name for name in TORCHRUN if name in env]
        raise LaunchError(
            f"{', '.join(present)} set but {', '.join(missing)} not: start with torchrun (which sets all of them) "
            "or unset them for a single process"
        )
    rank, world = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
    local_rank = _integer(env, "LOCAL_RANK")
    local_world = _integer(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else world
    if not rank < world or not local_rank < local_world <= world:
        raise LaunchError(
            f"impossible rank: RANK={rank} of WORLD_SIZE={world}, LOCAL_RANK={local_rank} of {local_world} per node"
        )
    return Launch(rank, world, local_rank, local_world, env["MASTER_ADDR"], _integer(env, "MASTER_PORT"), "torchrun")


def _from_slurm(env: Mapping[str, str]) -> Launch:
    world = _step_tasks(env)
    rank = _integer(env, "SLURM_PROCID")
    if world == 1 and rank == 0:
        return Launch(launcher="slurm")
    missing = [name for name in ("SLURM_LOCALID", "SLURM_JOB_ID") if name not in env]
    if missing or rank >= world:
        raise LaunchError(f"partial Slurm step: task {rank} of {world}, missing {', '.join(missing) or 'nothing'}")
    job = _integer(env, "SLURM_JOB_ID")
    return Launch(
        rank=rank,
        world_size=world,
        local_rank=_integer(env, "SLURM_LOCALID"),
        local_world_size=_tasks_on_this_node(env),
        master_addr=env.get("MASTER_ADDR") or _first_host(env),
        master_port=_integer(env, "MASTER_PORT") if "MASTER_PORT" in env else port_of_job(job),
        launcher="slurm",
    )


def _step_tasks(env: Mapping[str, str]) -> int:
    name = next((n for n in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if n in env), None)
    if name is None:
        raise LaunchError(
            "SLURM_PROCID set but neither SLURM_STEP_NUM_TASKS nor SLURM_NTASKS: not a whole Slurm step"
        )
    return _integer(env, name)


def _tasks_on_this_node(env: Mapping[str, str]) -> int:
    """SLURM_STEP_TASKS_PER_NODE is `2(x3),1`: two tasks on each of three nodes, one on the fourth."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "1"
    counts: list[int] = []
    for part in text.split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.rstrip(")") or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    if node >= len(counts):
        raise LaunchError(f"SLURM_NODEID={node} but SLURM_STEP_TASKS_PER_NODE={text} lists {len(counts)} nodes")
    return counts[node]


def _first_host(env: Mapping[str, str]) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise LaunchError("SLURM_JOB_NODELIST is not set: cannot tell where rank 0 runs; export MASTER_ADDR")
    if not any(c in nodes for c in "[,"):
        return nodes
    if shutil.which("scontrol") is None:
        raise LaunchError("scontrol is not on PATH: cannot read the node list; export MASTER_ADDR")
    # scontrol expands the node list's syntax, such as n[1-3,7]
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        raise LaunchError(f"scontrol show hostnames {nodes} failed: {done.stderr.strip()}")
    return done.stdout.split()[0]


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        value = int(env[name])
    except ValueError:
        value = -1
    if value < 0:
        raise LaunchError(f"{name}={env[name]!r} is not an integer of 0 or more")
    return value


def choose_device(name: str, launch: Launch) -> torch.device:
    """This rank's device for `auto`, `cpu` or `cuda`. Raises ConfigError or LaunchError."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("runtime.device is cuda, but PyTorch sees no CUDA device; use runtime.device=auto or cpu")
    visible = torch.cuda.device_count()
    # where Slurm binds one GPU to each task, every task sees its own GPU as number 0
    index = 0 if visible == 1 and launch.launcher == "slurm" else launch.local_rank
    if index >= visible:
        raise LaunchError(
            f"local rank {launch.local_rank} has no GPU of its own: {visible} visible for "
            f"{launch.local_world_size} ranks on this node"
        )
    return torch.device("cuda", index)


@contextmanager
def start(
    *,
    device: str = "auto",
    threads: int | None = None,
    timeout_s: float = 600.0,
    deterministic: bool = False,
    reuse_memory: bool = False,
) -> Iterator[Runtime]:
    """Set up this process: device, threads, memory, determinism, and a process group when there are several ranks
    (nccl for CUDA tensors, gloo for CPU tensors). The process group is destroyed when the block ends."""
    launch = resolve()
    chosen = choose_device(device, launch)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif reuse_memory:
        keep_freed_memory()
    # not OMP_NUM_THREADS, which torchrun sets to 1: sharing the cores among the ranks of this node is faster
    torch.set_num_threads(threads or fair_threads(launch))
    set_numerics(deterministic)
    if launch.world_size > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            init_method=f"tcp://{launch.master_addr}:{launch.master_port}"
            if launch.launcher == "slurm"
            else "env://",
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=chosen if chosen.type == "cuda" else None,
        )
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
            return max(1, min(cores, _integer(env, "SLURM_CPUS_PER_TASK")) // _concurrent_runs(env))
        if "SLURM_CPUS_ON_NODE" in env and cores < _integer(env, "SLURM_CPUS_ON_NODE"):
            return max(1, cores // _concurrent_runs(env))
    return max(1, cores // (launch.local_world_size * _concurrent_runs(env)))


def _concurrent_runs(env: Mapping[str, str]) -> int:
    return max(1, _integer(env, CONCURRENT_RUNS)) if CONCURRENT_RUNS in env else 1


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
