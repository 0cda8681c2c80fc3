"""From environment variables to a process's rank.

One resolver for torchrun, Slurm's srun and a single process. A partial or contradictory environment is an
error: it never silently becomes a world size of 1, which would train N independent copies of the run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from ..environment import LOCAL_JOB, TORCHRUN, port_of_job
from ..errors import LaunchError


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
    run: str = ""
    """What tells this run from others that may use the same port."""
    may_move: bool = False
    """Whether the port was computed, so that rank 0 takes the next free one where it is occupied."""
    agent_store: bool = False
    """Whether torchrun's agent keeps the ranks' store."""


def resolve(env: Mapping[str, str] | None = None) -> Launch:
    """Read the launch from environment variables (default: os.environ). Raises LaunchError."""
    env = os.environ if env is None else env
    in_step = "SLURM_STEP_ID" in env and "SLURM_PROCID" in env
    # MASTER_ADDR and MASTER_PORT alone are often exported in shells and say nothing about ranks
    if any(name in env for name in TORCHRUN[:3]):
        launch = _from_torchrun(env)
        if in_step and "TORCHELASTIC_RUN_ID" not in env:
            step = (integer_of(env, "SLURM_PROCID"), _step_tasks(env))
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


def check_one_process(command: str, env: Mapping[str, str] | None = None) -> None:
    """Raise LaunchError where torchrun or srun started several processes of a command that is the work of one."""
    env = os.environ if env is None else env
    is_step = "SLURM_STEP_ID" in env and "SLURM_PROCID" in env
    if "WORLD_SIZE" in env and integer_of(env, "WORLD_SIZE") > 1:
        instead, processes = "start it without torchrun", integer_of(env, "WORLD_SIZE")
    elif is_step and _step_tasks(env) > 1:
        instead, processes = f"write `srun --ntasks=1 hpc-supcon {command} ...`", _step_tasks(env)
    else:
        return
    raise LaunchError(
        f"`hpc-supcon {command}` is the work of one process, but {processes} were started, which would all do it: "
        f"{instead}"
    )


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    missing = [name for name in TORCHRUN if name not in env]
    if missing:
        present = [name for name in TORCHRUN if name in env]
        raise LaunchError(
            f"{', '.join(present)} set but {', '.join(missing)} not: start with torchrun (which sets all of them) "
            "or unset them for a single process"
        )
    rank, world = integer_of(env, "RANK"), integer_of(env, "WORLD_SIZE")
    local_rank = integer_of(env, "LOCAL_RANK")
    local_world = integer_of(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else world
    if not rank < world or not local_rank < local_world <= world:
        raise LaunchError(
            f"impossible rank: RANK={rank} of WORLD_SIZE={world}, LOCAL_RANK={local_rank} of {local_world} per node"
        )
    return Launch(
        rank,
        world,
        local_rank,
        local_world,
        master_addr=env["MASTER_ADDR"],
        master_port=_port(env),
        launcher="torchrun",
        run=_run(env, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
        may_move=LOCAL_JOB in env,  # the grid, too, computes the port of its jobs on this machine
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _from_slurm(env: Mapping[str, str]) -> Launch:
    world = _step_tasks(env)
    rank = integer_of(env, "SLURM_PROCID")
    if world == 1 and rank == 0:
        return Launch(launcher="slurm")
    missing = [name for name in ("SLURM_LOCALID", "SLURM_JOB_ID") if name not in env]
    if missing or rank >= world:
        raise LaunchError(f"partial Slurm step: task {rank} of {world}, missing {', '.join(missing) or 'nothing'}")
    port = port_of_job(integer_of(env, "SLURM_JOB_ID"), integer_of(env, "SLURM_STEP_ID"))
    return Launch(
        rank=rank,
        world_size=world,
        local_rank=integer_of(env, "SLURM_LOCALID"),
        local_world_size=_tasks_on_this_node(env),
        master_addr=env.get("MASTER_ADDR") or _first_host(env),
        master_port=_port(env) if "MASTER_PORT" in env else port,
        launcher="slurm",
        # a task of a job array has a job id of its own
        run=_run(env, "SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
        may_move="MASTER_PORT" not in env,
    )


def _run(env: Mapping[str, str], *names: str) -> str:
    """One word, the same on all ranks of a run."""
    words = [env.get(name, "") for name in (*names, LOCAL_JOB)]
    return "/".join("".join(c if c.isprintable() and not c.isspace() else "_" for c in word) for word in words)


def _step_tasks(env: Mapping[str, str]) -> int:
    name = next((n for n in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if n in env), None)
    if name is None:
        raise LaunchError(
            "SLURM_PROCID set but neither SLURM_STEP_NUM_TASKS nor SLURM_NTASKS: not a whole Slurm step"
        )
    return integer_of(env, name)


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


def integer_of(env: Mapping[str, str], name: str) -> int:
    try:
        value = int(env[name])
    except ValueError:
        value = -1
    if value < 0:
        raise LaunchError(f"{name}={env[name]!r} is not an integer of 0 or more")
    return value


def _port(env: Mapping[str, str]) -> int:
    port = integer_of(env, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise LaunchError(f"MASTER_PORT={port} is not a port: use a number of 1 to 65535")
    return port
