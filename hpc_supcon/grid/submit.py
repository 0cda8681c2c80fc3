"""Handing a grid to Slurm through submitit, or running it here (here.py): the only two files that import it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import ConfigError, LaunchError
from ..files import private_folder
from . import slurm, worker
from .arrays import Array, arguments_of, arrange
from .expand import Node
from .files import Profile
from .folder import JOBS, Frozen, FrozenNode, append_submission, prepare
from .local import Tell, gpus_here, run_here, run_in_turn
from .node_state import WAITING, NodeState, node_states

ARRAY_PARALLELISM = 64
"""Jobs of one array that run at once, where the profile leaves it open: a neighborly number."""


def require_cluster(cluster: str) -> None:
    """Raises LaunchError where Slurm's commands are missing."""
    if cluster == "slurm":
        for command in ("sbatch", "srun", "squeue", "scancel"):
            slurm.require(command)


def check_profile(nodes: Iterable[FrozenNode | Node], profile: Profile, cluster: str) -> None:
    """Raises ConfigError where a job asks for more than the cluster has, before anything is submitted."""
    gpus = len(gpus_here(profile)) if cluster == "local" else profile.gpus_per_node
    whole = "this machine" if cluster == "local" else "the cluster"
    for node in nodes:
        asked = node.resources
        limits = [
            ("gpus", asked.gpus, gpus),
            ("nodes", asked.nodes, profile.nodes if cluster == "slurm" else 1),
            ("minutes", asked.minutes, profile.minutes),
        ]
        for what, wanted, most in limits:
            if most is not None and wanted > most:
                raise ConfigError(f"{node.name}: asks for {what}: {wanted}, {whole} has at most {most}")
        if cluster == "debug" and asked.tasks_per_node > 1:
            raise ConfigError(f"{node.name}: {asked.tasks_per_node} ranks, but --cluster debug runs one process")


def to_submit(frozen: Frozen, states: dict[str, NodeState], again: Iterable[str]) -> list[FrozenNode]:
    """Nodes in a state of `again`, and those that wait for one of them, in the grid's order."""
    wanted: dict[str, FrozenNode] = {}
    for name, node in frozen.nodes.items():
        if states[name].state in again or (node.parent in wanted and states[name].state != "done"):
            wanted[name] = node
    return list(wanted.values())


def submit(frozen: Frozen, again: Iterable[str], tell: Tell) -> int:
    """Submit (or, on `local` and `debug`, run) what is in a state of `again`; returns how many nodes that are.

    Call under folder.lock. Raises LaunchError with sbatch's own words when it refuses; nothing of this call is
    left in the queue then.
    """
    states = node_states(frozen)
    wanted = to_submit(frozen, states, frozenset(again))
    check_profile(wanted, frozen.profile, frozen.cluster)
    prepare(frozen, wanted)
    live = {n: state.job for n, state in states.items() if state.state in WAITING and slurm.is_job(state.job)}
    arrays = arrange(wanted, frozen.pack, frozen.profile.array, live)
    if frozen.cluster == "slurm":
        _submit_to_slurm(frozen, arrays, tell)
        return len(wanted)
    run = run_here if frozen.cluster == "local" else run_in_turn
    try:
        run(frozen, arrays, tell)
    except KeyboardInterrupt:
        tell("stopped; submit again to go on")
        raise
    return len(wanted)


def _submit_to_slurm(frozen: Frozen, arrays: Sequence[Array], tell: Tell) -> None:
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    ids: dict[int, str] = {}
    for array in arrays:
        executor = SlurmExecutor(private_folder(frozen.root / JOBS), python=frozen.profile.python)
        executor.update_parameters(**sbatch_parameters(frozen, array, ids))
        try:
            arguments = zip(*(arguments_of(frozen, bundle) for bundle in array.bundles), strict=True)
            jobs = executor.map_array(worker.STAGES[array.stage], *arguments)
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            if ids:
                slurm.cancel(ids.values())
            words = " ".join(str(error).split())
            raise LaunchError(
                f"sbatch refused {array.stage}: {words}; nothing of this grid is left in the queue"
            ) from None
        ids[id(array)] = jobs[0].job_id.partition("_")[0]
        append_submission(
            frozen.root,
            array.stage,
            {node.name: job.job_id for job, bundle in zip(jobs, array.bundles, strict=True) for node in bundle},
        )
        tell(f"{array.stage}: job {ids[id(array)]}, {len(array.bundles)} tasks")


def sbatch_parameters(frozen: Frozen, array: Array, ids: dict[int, str]) -> dict[str, Any]:
    """submitit's parameters of one array; `ids` holds the job ids of the arrays before it, by id(array)."""
    profile, asked = frozen.profile, array.resources
    additional: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes", **profile.sbatch}
    parameters: dict[str, Any] = {
        "job_name": f"{frozen.name}.{array.stage}",
        "time": asked.minutes,
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks_per_node,
        "cpus_per_task": asked.cpus,
        "gpus_per_node": asked.gpus or None,
        "mem": None if asked.memory_gb is None else f"{int(asked.memory_gb * 1024)}M",
        "partition": asked.partition or profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "array_parallelism": profile.parallel or ARRAY_PARALLELISM,
        "signal_delay_s": profile.signal_s,
        "setup": [*(f"export {k}={shlex.quote(v)}" for k, v in profile.environment.items()), *profile.setup] or None,
        # a rank that fails must end the others, which wait for it; srun does not take over sbatch's cpus-per-task
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={asked.cpus}"],
        "dependency": _dependency(array, ids),
        "additional_parameters": additional,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def _dependency(array: Array, ids: dict[int, str]) -> str | None:
    if array.live is not None:
        return f"afterok:{array.live}"
    if array.after is None:
        return None
    # aftercorr: each task waits for the task of its own number, not for the whole array
    return f"{'aftercorr' if len(array.bundles) > 1 else 'afterok'}:{ids[id(array.after)]}"
