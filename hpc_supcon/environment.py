"""Names and numbers that the launcher, the grid and the batch scripts must agree on. Imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from . import __version__

CONCURRENT_RUNS = "HPC_SUPCON_CONCURRENT_RUNS"
"""Environment variable: how many runs of a grid, each with its ranks, share the cores at the same time."""
LOCAL_JOB = "HPC_SUPCON_LOCAL_JOB"
"""Environment variable: id of a grid's job on this machine, whose MASTER_PORT the grid computed from it."""
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables without which torchrun starts no process."""

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID")
"""Environment variables of a process that may be one of several ranks."""

COMMIT_FILE = "COMMIT"
"""File of an installed package with the commit that it was built from: see setup.py."""

_FIRST_PORT, _PORTS = 15000, 17000
_STEP = 331  # the steps of a job are far from those of the jobs after it
_TRIED = 16


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one, as far as the launcher's variables say."""
    return all(os.environ.get(key, "0") in ("", "0") for key in RANK_VARIABLES if key != "WORLD_SIZE")


def port_of_job(job: int, step: int = 0) -> int:
    """TCP port on which rank 0 of a scheduler's job listens: a number that all ranks compute without a message.

    Below the ephemeral ports (32768 up on Linux), and different for the jobs that share a node, and for the steps of
    a job.
    """
    return _FIRST_PORT + (job + _STEP * step) % _PORTS


def ports_from(port: int) -> list[int]:
    """The ports that rank 0 tries in this order, where `port` is the one that `port_of_job` gave."""
    return [_FIRST_PORT + (port - _FIRST_PORT + i) % _PORTS for i in range(_TRIED)]


def code_commit() -> str:
    """The git commit that the package is of, as `known_commit` has it; its version where none is known."""
    return known_commit() or f"version {__version__}"


def known_commit() -> str | None:
    """The commit of the checkout, with "+changes" if files differ from it, or the one that a wheel was built from."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():  # installed, maybe into an environment inside of somebody's repository
        recorded = here / COMMIT_FILE
        return recorded.read_text(encoding="utf-8").strip() if recorded.is_file() else None
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip()
