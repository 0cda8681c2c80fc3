"""Running a grid on this machine: submitit's local executor, with a queue.

Each job waits until there are cores and GPUs for it, which no other job uses. When this process ends, by whatever
signal, its jobs let their stages save and exit.
"""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..environment import CONCURRENT_RUNS
from ..errors import LaunchError
from ..files import private_folder
from . import worker
from .arrays import JobArray, JobNodes, job_arguments
from .folder import JOBS, FrozenGrid, append_submission, local_job_id, local_queue_id
from .job_environment import RUNNER
from .schema import ClusterProfile, Resources


def local_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def local_gpus(profile: ClusterProfile) -> list[int]:
    """CUDA indices of the GPUs that jobs may use. Raises LaunchError."""
    if profile.gpus_per_node is not None:
        return list(range(profile.gpus_per_node))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(range(len(list(Path("/dev").glob("nvidia[0-9]*")))))
    try:
        return [int(number) for number in visible.split(",") if number.strip()]
    except ValueError:
        raise LaunchError(f"CUDA_VISIBLE_DEVICES={visible!r}: give the GPUs by index, not by name") from None


@dataclass
class FreeResources:
    """What no job uses: how many more jobs may run (None: any number), cores, and indices of GPUs."""

    jobs: int | None
    cores: int
    gpus: list[int]

    def fits(self, requested: Resources, idle: bool) -> bool:
        """Whether a job can start. One that requests more cores than there are runs when the machine is idle."""
        return (
            (self.jobs is None or self.jobs > 0)
            and (idle or self.cores >= cores_needed(requested))
            and len(self.gpus) >= requested.gpus
        )

    def take(self, requested: Resources) -> list[int]:
        """Give a job its resources; returns the indices of its GPUs."""
        self.cores -= cores_needed(requested)
        self.jobs = None if self.jobs is None else self.jobs - 1
        gpus, self.gpus = self.gpus[: requested.gpus], self.gpus[requested.gpus :]
        return gpus

    def release(self, requested: Resources, gpus: Sequence[int]) -> None:
        """Take back the resources of a job that has ended."""
        self.cores += cores_needed(requested)
        self.jobs = None if self.jobs is None else self.jobs + 1
        self.gpus = sorted([*self.gpus, *gpus])


def cores_needed(requested: Resources) -> int:
    return requested.tasks_per_node * requested.cpus


def run_jobs(frozen: FrozenGrid, arrays: Sequence[JobArray], log: Callable[[str], None]) -> None:
    """Run all jobs on this machine, parents first, and return when all have ended."""
    _record_waiting(frozen, arrays)
    free = FreeResources(frozen.profile.parallel, local_cores(), local_gpus(frozen.profile))
    waiting = [(array, i) for array in arrays for i in range(len(array.jobs))]
    concurrent_runs = _concurrent_runs(arrays, free)
    running: dict[tuple[int, int], tuple[Any, Resources, list[int]]] = {}
    ended: set[tuple[int, int]] = set()
    os.environ[RUNNER] = str(os.getpid())
    while waiting or running:
        for key in [key for key, (job, _, _) in running.items() if job.done()]:
            free.release(*running.pop(key)[1:])
            ended.add(key)
        for array, i in list(waiting):
            is_blocked = array.parent is not None and (id(array.parent), i) not in ended
            if is_blocked or not free.fits(array.resources, idle=not running):
                continue
            gpus = free.take(array.resources)
            os.environ[CONCURRENT_RUNS] = str(concurrent_runs(array.resources))
            nodes = array.jobs[i]
            job = _start(frozen, array, nodes, gpus)
            running[id(array), i] = job, array.resources, gpus
            waiting.remove((array, i))
            append_submission(frozen.root, array.stage, {n.name: local_job_id(job.job_id) for n in nodes})
            log(f"{' '.join(node.name for node in nodes)}: process {job.job_id}")
        time.sleep(0.1)


def run_in_process(frozen: FrozenGrid, arrays: Sequence[JobArray], log: Callable[[str], None]) -> None:
    """Run one job after the other in this process. (submitit's own debug executor starts a debugger.)"""
    _record_waiting(frozen, arrays)
    for array in arrays:
        for nodes in array.jobs:
            append_submission(frozen.root, array.stage, {node.name: local_job_id(os.getpid()) for node in nodes})
            log(" ".join(node.name for node in nodes))
            try:
                worker.run_nodes(*job_arguments(frozen, nodes))
            except SystemExit:  # this job failed, which its record says
                continue


def _concurrent_runs(arrays: Sequence[JobArray], free: FreeResources) -> Callable[[Resources], int]:
    """requested resources -> how many jobs share the cores. All that run at once have no more threads than cores."""
    cores, max_jobs, gpus = free.cores, free.jobs, len(free.gpus)
    parents = {id(array.parent) for array in arrays}
    first = sum(len(array.jobs) for array in arrays if array.parent is None)
    last = sum(len(array.jobs) for array in arrays if id(array) not in parents)
    alike = len({(cores_needed(array.resources), array.resources.gpus) for array in arrays}) == 1

    def concurrent_runs(requested: Resources) -> int:
        limits = [-(-cores // cores_needed(requested))]
        limits += [max_jobs] if max_jobs is not None else []
        if alike:  # otherwise jobs of another kind may use what these cannot
            limits += [max(first, last), *([gpus // requested.gpus] if requested.gpus else [])]
        return max(1, min(limits))

    return concurrent_runs


def _record_waiting(frozen: FrozenGrid, arrays: Sequence[JobArray]) -> None:
    """For `grid status`, which then shows the jobs as waiting in this process."""
    for array in arrays:
        append_submission(frozen.root, array.stage, {n.name: local_queue_id() for job in array.jobs for n in job})


def _start(frozen: FrozenGrid, array: JobArray, nodes: JobNodes, gpus: Sequence[int]) -> Any:
    from submitit.local.local import LocalExecutor

    profile, requested = frozen.profile, array.resources
    executor = LocalExecutor(private_folder(frozen.root / JOBS), python=profile.python)
    setup = [*(f"export {k}={shlex.quote(v)}" for k, v in profile.environment.items()), *profile.setup]
    executor.update_parameters(
        timeout_min=requested.minutes,
        tasks_per_node=requested.tasks_per_node,
        gpus_per_node=len(gpus),
        visible_gpus=list(gpus),
        signal_delay_s=profile.signal_s,
        **({"setup": setup} if setup else {}),
    )
    with _ignoring_sigint():
        return executor.submit(worker.run_nodes, *job_arguments(frozen, nodes))


@contextmanager
def _ignoring_sigint() -> Iterator[None]:
    """Processes started in the block ignore Ctrl-C until they set a handler: submitit's would kill the stages."""
    old_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old_handler)
