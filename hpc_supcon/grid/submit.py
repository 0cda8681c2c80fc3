"""Submitting a grid to Slurm through submitit, or running it on this machine (local.py). Only these two import it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..errors import ConfigError, LaunchError
from ..files import private_folder
from . import slurm, worker
from .arrays import JobArray, job_arguments, make_arrays
from .expand import Node
from .folder import JOBS, FrozenGrid, FrozenNode, append_submission, prepare_run_folders
from .local import local_gpus, run_in_process, run_jobs
from .node_state import QUEUED, NodeState, node_states
from .schema import ClusterProfile

ARRAY_PARALLELISM = 64
"""Jobs of one array that run at once, where the profile does not say: leaves room for other users of the cluster."""


def require_cluster(cluster: str) -> None:
    """Raises LaunchError if a command of Slurm that is needed is not installed."""
    if cluster == "slurm":
        for command in ("sbatch", "srun", "squeue", "scancel"):
            slurm.require(command)


def check_profile(nodes: Iterable[FrozenNode | Node], profile: ClusterProfile, cluster: str) -> None:
    """Raises ConfigError if a job requests more than the cluster has."""
    gpus = len(local_gpus(profile)) if cluster == "local" else profile.gpus_per_node
    whole = "this machine" if cluster == "local" else "the cluster"
    for node in nodes:
        requested = node.resources
        limits = [
            ("gpus", requested.gpus, gpus),
            ("nodes", requested.nodes, profile.nodes if cluster == "slurm" else 1),
            ("minutes", requested.minutes, profile.minutes),
        ]
        for what, number, limit in limits:
            if limit is not None and number > limit:
                raise ConfigError(f"{node.name}: requests {what}: {number}, {whole} has at most {limit}")
        if cluster == "debug" and requested.tasks_per_node > 1:
            raise ConfigError(f"{node.name}: {requested.tasks_per_node} ranks, but --cluster debug runs one process")


def nodes_to_submit(frozen: FrozenGrid, states: dict[str, NodeState], to_submit: Iterable[str]) -> list[FrozenNode]:
    """Nodes in one of the states `to_submit`, and those that depend on one of them, in the grid's order."""
    chosen: dict[str, FrozenNode] = {}
    for name, node in frozen.nodes.items():
        if states[name].state in to_submit or (node.parent in chosen and states[name].state != "done"):
            chosen[name] = node
    return list(chosen.values())


def submit(frozen: FrozenGrid, to_submit: Iterable[str], log: Callable[[str], None]) -> int:
    """Submit (or, on `local` and `debug`, run) the nodes in one of the states `to_submit`; returns their number.

    The caller holds folder.lock. Raises LaunchError with sbatch's message if it fails; jobs that this call submitted
    before are then cancelled.
    """
    states = node_states(frozen)
    nodes = nodes_to_submit(frozen, states, frozenset(to_submit))
    check_profile(nodes, frozen.profile, frozen.cluster)
    prepare_run_folders(frozen, nodes)
    queued = {n: state.job for n, state in states.items() if state.state in QUEUED and slurm.is_job(state.job)}
    arrays = make_arrays(nodes, frozen.pack, frozen.profile.array, queued)
    if frozen.cluster == "slurm":
        _submit_to_slurm(frozen, arrays, log)
        return len(nodes)
    run = run_jobs if frozen.cluster == "local" else run_in_process
    try:
        run(frozen, arrays, log)
    except KeyboardInterrupt:
        log("stopped; submit again to go on")
        raise
    return len(nodes)


def _submit_to_slurm(frozen: FrozenGrid, arrays: Sequence[JobArray], log: Callable[[str], None]) -> None:
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    ids: dict[int, str] = {}
    for array in arrays:
        executor = SlurmExecutor(private_folder(frozen.root / JOBS), python=frozen.profile.python)
        executor.update_parameters(**sbatch_parameters(frozen, array, ids))
        try:
            arguments = zip(*(job_arguments(frozen, nodes) for nodes in array.jobs), strict=True)
            jobs = executor.map_array(worker.run_nodes, *arguments)
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            if ids:
                slurm.cancel(ids.values())
            message = " ".join(str(error).split())
            raise LaunchError(
                f"sbatch refused {array.stage}: {message}; no job of this submission is left in the queue"
            ) from None
        ids[id(array)] = jobs[0].job_id.partition("_")[0]
        append_submission(
            frozen.root,
            array.stage,
            {node.name: job.job_id for job, nodes in zip(jobs, array.jobs, strict=True) for node in nodes},
        )
        log(f"{array.stage}: job {ids[id(array)]}, {len(array.jobs)} tasks")


def sbatch_parameters(frozen: FrozenGrid, array: JobArray, ids: dict[int, str]) -> dict[str, Any]:
    """submitit's parameters of one array. ids: id(array) -> job id of the arrays that were submitted before."""
    profile, requested = frozen.profile, array.resources
    additional: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes", **profile.sbatch}
    parameters: dict[str, Any] = {
        "job_name": f"{frozen.name}.{array.stage}",
        "time": requested.minutes,
        "nodes": requested.nodes,
        "ntasks_per_node": requested.tasks_per_node,
        "cpus_per_task": requested.cpus,
        "gpus_per_node": requested.gpus or None,
        "mem": None if requested.memory_gb is None else f"{int(requested.memory_gb * 1024)}M",
        "partition": requested.partition or profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "array_parallelism": profile.parallel or ARRAY_PARALLELISM,
        "signal_delay_s": profile.signal_s,
        "setup": [*(f"export {k}={shlex.quote(v)}" for k, v in profile.environment.items()), *profile.setup] or None,
        # a rank that fails must end the others, which wait for it; srun does not inherit sbatch's --cpus-per-task
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={requested.cpus}"],
        "dependency": _dependency(array, ids),
        "additional_parameters": additional,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def _dependency(array: JobArray, ids: dict[int, str]) -> str | None:
    if array.queued_parent is not None:
        return f"afterok:{array.queued_parent}"
    if array.parent is None:
        return None
    # aftercorr: each task depends on the task of the same index, not on the whole array
    return f"{'aftercorr' if len(array.jobs) > 1 else 'afterok'}:{ids[id(array.parent)]}"
