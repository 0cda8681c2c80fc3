"""The environment of a job's process: under Slurm, on submitit's local executor, or in the process that submits."""

from __future__ import annotations

import os
import select
import sys
from dataclasses import dataclass

from ..environment import LOCAL_JOB, TORCHRUN, port_of_job
from . import slurm
from .folder import local_job_id

RUNNER = "HPC_SUPCON_GRID_RUNNER"
"""Environment variable: pid of the process that runs a grid on this machine. Its jobs end when it does."""


@dataclass(frozen=True)
class JobEnvironment:
    """The scheduler (slurm | local | debug), the job's id, and this process's rank in it.

    variables: the environment variables from which the job's stages read their rank. runner: pidfd of the process
    that runs the grid, None where it cannot end before the job.
    """

    scheduler: str
    id: str
    rank: int
    restarts: int
    variables: dict[str, str]
    runner: int | None = None

    def runner_has_exited(self) -> bool:
        return self.runner is not None and bool(select.select([self.runner], [], [], 0)[0])


def read_job_environment() -> JobEnvironment:
    """This process's. Ends it through sys.exit if the process that runs the grid has exited already."""
    variables, env = dict(os.environ), os.environ
    if "SUBMITIT_LOCAL_JOB_ID" in env and env.get("SUBMITIT_EXECUTOR") == "local":
        ranks = int(env["SUBMITIT_LOCAL_NTASKS"])
        rank, job = int(env["SUBMITIT_LOCAL_GLOBALID"]), env["SUBMITIT_LOCAL_JOB_ID"]
        _remove_launcher_variables(variables)
        if ranks > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            variables |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            variables |= {"MASTER_PORT": str(port_of_job(int(job))), LOCAL_JOB: job}
        if not env.get("CUDA_VISIBLE_DEVICES"):
            variables["CUDA_VISIBLE_DEVICES"] = ""
        try:
            runner = os.pidfd_open(int(env[RUNNER]))
        except ProcessLookupError:
            sys.exit(f"process {env[RUNNER]}, which ran the grid, has exited")
        return JobEnvironment("local", local_job_id(job), rank, 0, variables, runner)
    if env.get("SUBMITIT_EXECUTOR") == "slurm":
        rank, restarts = int(env["SLURM_PROCID"]), int(env.get("SLURM_RESTART_COUNT", "0"))
        return JobEnvironment("slurm", slurm.own_job(), rank, restarts, variables)
    _remove_launcher_variables(variables)
    return JobEnvironment("debug", local_job_id(os.getpid()), 0, 0, variables)


def _remove_launcher_variables(variables: dict[str, str]) -> None:
    """A grid that is started inside another job must not take its ranks for its own."""
    for name in list(variables):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in (*TORCHRUN, "LOCAL_WORLD_SIZE", LOCAL_JOB):
            del variables[name]
