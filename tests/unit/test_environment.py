"""What the launcher, the grid and the batch scripts must agree on."""

from __future__ import annotations

import pytest

from hpc_supcon.environment import port_of_job
from hpc_supcon.errors import Preempted


def test_the_port_of_a_job_is_unprivileged_and_not_ephemeral():
    ports = [port_of_job(job) for job in (*range(20000), 59_999_999)]
    assert 1024 <= min(ports) <= max(ports) < 32768
    assert len(set(ports[:17000])) == 17000, "jobs with consecutive ids have different ports"


@pytest.mark.parametrize("name", ["array", "train", "train-torchrun"])
def test_the_batch_scripts_requeue_a_job_that_ends_with_the_exit_code_of_a_preempted_run(request, name):
    script = (request.config.rootpath / "slurm" / f"{name}.sbatch").read_text()
    assert f"$code == {Preempted.exit_code} " in script
