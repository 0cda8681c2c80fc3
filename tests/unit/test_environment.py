"""What the launcher, the grid and the batch scripts must agree on."""

from __future__ import annotations

import subprocess

import pytest

from hpc_supcon import __version__, environment
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


def test_the_commit_is_that_of_the_package_and_not_of_a_repository_around_it(tmp_path, monkeypatch):
    package = tmp_path / "repository/.venv/hpc_supcon"
    package.mkdir(parents=True)
    git = ["git", "-C", str(package.parents[1]), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    assert environment.code_commit() == f"version {__version__}"
    monkeypatch.setattr(environment, "__file__", str(package.parents[1] / "hpc_supcon/environment.py"))
    (package.parents[1] / "hpc_supcon").mkdir()
    assert environment.code_commit() == head
