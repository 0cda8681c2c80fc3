"""Names and numbers that the launcher, the grid and the batch scripts must agree on. Imports nothing heavy."""

from __future__ import annotations

CONCURRENT_RUNS = "HPC_SUPCON_CONCURRENT_RUNS"
"""Environment variable: how many runs of a grid, each with its ranks, share the cores at the same time."""
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables without which torchrun starts no process."""

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID")
"""Environment variables of a process that may be one of several ranks."""


def port_of_job(job: int) -> int:
    """TCP port on which rank 0 of a scheduler's job listens: a number that all ranks compute without a message.

    Below the ephemeral ports (32768 up on Linux), and different for the jobs that share a node.
    """
    return 15000 + job % 17000
