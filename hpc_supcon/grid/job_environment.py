"""Where a process of a grid's job finds itself: under Slurm, on submitit's local executor, or in the submitter."""

from __future__ import annotations

import os
import select
import sys
from dataclasses import dataclass

from ..environment import TORCHRUN, port_of_job
from . import slurm
from .folder import job_here

RUNNER = "HPC_SUPCON_GRID_RUNNER"
"""Environment variable: the process that runs a grid on this machine, and with which its jobs end."""


@dataclass(frozen=True)
class Place:
    """Where a job's process runs, and the environment in which its stages find their rank."""

    scheduler: str
    job: str
    rank: int
    restarts: int
    environment: dict[str, str]
    runner: int | None = None
    """pidfd of the process that runs the grid."""

    def deserted(self) -> bool:
        return self.runner is not None and bool(select.select([self.runner], [], [], 0)[0])


def find_place() -> Place:
    """Where this process runs. Leaves through sys.exit where whoever started it is gone already."""
    env, outer = dict(os.environ), os.environ
    if "SUBMITIT_LOCAL_JOB_ID" in outer and outer.get("SUBMITIT_EXECUTOR") == "local":
        ranks = int(outer["SUBMITIT_LOCAL_NTASKS"])
        rank, job = int(outer["SUBMITIT_LOCAL_GLOBALID"]), outer["SUBMITIT_LOCAL_JOB_ID"]
        _forget_launchers(env)
        if ranks > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            env["MASTER_PORT"] = str(port_of_job(int(job)))
        if not outer.get("CUDA_VISIBLE_DEVICES"):
            env["CUDA_VISIBLE_DEVICES"] = ""
        try:
            runner = os.pidfd_open(int(env[RUNNER]))
        except ProcessLookupError:
            sys.exit(f"process {env[RUNNER]}, which ran the grid, is gone")
        return Place("local", job_here(job), rank, 0, env, runner)
    if outer.get("SUBMITIT_EXECUTOR") == "slurm":
        return Place(
            "slurm", slurm.own_job(), int(outer["SLURM_PROCID"]), int(outer.get("SLURM_RESTART_COUNT", "0")), env
        )
    _forget_launchers(env)
    return Place("debug", job_here(os.getpid()), 0, 0, env)


def _forget_launchers(env: dict[str, str]) -> None:
    """A grid that is started from inside a job is not part of it."""
    for name in list(env):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in (*TORCHRUN, "LOCAL_WORLD_SIZE"):
            del env[name]
