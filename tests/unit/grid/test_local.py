"""Claims about the queue of this machine: nothing is given out twice, nothing is run before what it needs."""

from __future__ import annotations

import os
import random

import pytest

from hpc_supcon.environment import CONCURRENT_RUNS
from hpc_supcon.errors import LaunchError
from hpc_supcon.grid import job_environment, local
from hpc_supcon.grid.arrays import arrange
from hpc_supcon.grid.files import Profile, Resources
from hpc_supcon.grid.folder import Frozen, FrozenNode

KINDS = [Resources(), Resources(cpus=3), Resources(gpus=1), Resources(gpus=2, cpus=2), Resources(cpus=99)]


class Job:
    """Ends after some looks at it."""

    job_id = "1"

    def __init__(self, looks):
        self.looks = looks

    def done(self):
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("parallel", [None, 1, 3])
def test_jobs_wait_for_their_parents_and_for_cores_and_gpus_of_their_own(monkeypatch, tmp_path, parallel):
    draw = random.Random(0)
    nodes = {}
    for i in range(20):
        nodes[f"{i}.pretrain"] = FrozenNode(f"{i}.pretrain", "pretrain", str(i), None, draw.choice(KINDS), "")
        for k in range(draw.randrange(3)):
            name = f"{i}-{k}.probe"
            nodes[name] = FrozenNode(name, "probe", f"{i}-{k}", f"{i}.pretrain", draw.choice(KINDS), "")
    profile = Profile(cluster="local", gpus_per_node=3, parallel=parallel)
    frozen = Frozen(tmp_path, "g", "local", profile, "", 1, (), nodes, ())
    started, running, threads, most = [], {}, {}, 0

    def start(frozen, array, bundle, gpus):
        nonlocal most
        for name in [name for name, (job, _, _) in running.items() if job.looks < 0]:
            del running[name]
        (node,) = bundle
        assert node.parent is None or (node.parent in started and node.parent not in running)
        assert len(gpus) == node.resources.gpus
        assert not {g for _, _, theirs in running.values() for g in theirs} & set(gpus)
        cores = sum(local.cores_of(r) for _, r, _ in running.values()) + local.cores_of(node.resources)
        assert cores <= 4 or not running
        job = Job(draw.randrange(4))
        running[node.name] = job, node.resources, gpus
        started.append(node.name)
        most = max(most, len(running))
        threads[node.name] = 4 // int(os.environ[CONCURRENT_RUNS])
        assert sum(threads[name] for name in running) <= 4
        return job

    for name in (job_environment.RUNNER, CONCURRENT_RUNS):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(local, "_start", start)
    monkeypatch.setattr(local, "cores_here", lambda: 4)
    monkeypatch.setattr(local.time, "sleep", lambda seconds: None)
    local.run_here(frozen, arrange(list(nodes.values()), 1, 7), lambda line: None)
    assert sorted(started) == sorted(nodes)
    assert most <= (parallel or 4)
    assert most > 1 or parallel == 1


@pytest.mark.parametrize(("visible", "found"), [("", []), ("0,1", [0, 1]), ("5, 3", [5, 3]), ("GPU-8932f937", None)])
def test_the_gpus_of_this_machine(monkeypatch, visible, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if found is None:
        with pytest.raises(LaunchError, match="by their numbers"):
            local.gpus_here(Profile(cluster="local"))
    else:
        assert local.gpus_here(Profile(cluster="local")) == found
    assert local.gpus_here(Profile(cluster="local", gpus_per_node=2)) == [0, 1]
