"""The queue of this machine: no two jobs share a core or a GPU, and no job runs before its parent has ended."""

from __future__ import annotations

import os
import random

import pytest

from hpc_supcon.environment import CONCURRENT_RUNS
from hpc_supcon.errors import LaunchError
from hpc_supcon.grid import job_environment, local
from hpc_supcon.grid.arrays import make_arrays
from hpc_supcon.grid.folder import FrozenGrid, FrozenNode
from hpc_supcon.grid.schema import ClusterProfile, Resources

KINDS = [Resources(), Resources(cpus=3), Resources(gpus=1), Resources(gpus=2, cpus=2), Resources(cpus=99)]


class Job:
    """Ends after `done` was called some times."""

    job_id = "1"

    def __init__(self, calls):
        self.calls = calls

    def done(self):
        self.calls -= 1
        return self.calls < 0


@pytest.mark.parametrize("parallel", [None, 1, 3])
def test_jobs_wait_for_their_parents_and_for_cores_and_gpus_of_their_own(monkeypatch, tmp_path, parallel):
    rng = random.Random(0)
    nodes = {}
    for i in range(20):
        nodes[f"{i}.pretrain"] = FrozenNode(f"{i}.pretrain", "pretrain", str(i), None, rng.choice(KINDS), "")
        for k in range(rng.randrange(3)):
            name = f"{i}-{k}.probe"
            nodes[name] = FrozenNode(name, "probe", f"{i}-{k}", f"{i}.pretrain", rng.choice(KINDS), "")
    profile = ClusterProfile(cluster="local", gpus_per_node=3, parallel=parallel)
    frozen = FrozenGrid(tmp_path, "g", "local", profile, "", 1, (), nodes, ())
    started, running, threads, most = [], {}, {}, 0

    def start(frozen, array, job_nodes, gpus):
        nonlocal most
        for name in [name for name, (job, _, _) in running.items() if job.calls < 0]:
            del running[name]
        (node,) = job_nodes
        assert node.parent is None or (node.parent in started and node.parent not in running)
        assert len(gpus) == node.resources.gpus
        assert not {g for _, _, theirs in running.values() for g in theirs} & set(gpus)
        cores = sum(local.cores_needed(r) for _, r, _ in running.values()) + local.cores_needed(node.resources)
        assert cores <= 4 or not running
        job = Job(rng.randrange(4))
        running[node.name] = job, node.resources, gpus
        started.append(node.name)
        most = max(most, len(running))
        threads[node.name] = 4 // int(os.environ[CONCURRENT_RUNS])
        assert sum(threads[name] for name in running) <= 4
        return job

    for name in (job_environment.RUNNER, CONCURRENT_RUNS):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(local, "_start", start)
    monkeypatch.setattr(local, "local_cores", lambda: 4)
    monkeypatch.setattr(local.time, "sleep", lambda seconds: None)
    local.run_jobs(frozen, make_arrays(list(nodes.values()), 1, 7), lambda line: None)
    assert sorted(started) == sorted(nodes)
    assert most <= (parallel or 4)
    assert most > 1 or parallel == 1


@pytest.mark.parametrize(("visible", "found"), [("", []), ("0,1", [0, 1]), ("5, 3", [5, 3]), ("GPU-8932f937", None)])
def test_the_gpus_of_this_machine_are_those_of_cuda_visible_devices_or_the_profile(monkeypatch, visible, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if found is None:
        with pytest.raises(LaunchError, match="by index"):
            local.local_gpus(ClusterProfile(cluster="local"))
    else:
        assert local.local_gpus(ClusterProfile(cluster="local")) == found
    assert local.local_gpus(ClusterProfile(cluster="local", gpus_per_node=2)) == [0, 1]
