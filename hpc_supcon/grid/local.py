"""Running a grid on this machine: submitit's local executor, with the queue that it lacks.

Jobs share the machine as under a scheduler: each waits until there are cores and GPUs for it, and gets its own.
When this process ends, by whatever signal, its jobs let their stages save and leave.
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
from .arrays import Array, Bundle, arguments_of
from .files import Profile, Resources
from .folder import JOBS, Frozen, append_submission, job_here, queue_here
from .job_environment import RUNNER

Tell = Callable[[str], None]


def cores_here() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def gpus_here(profile: Profile) -> list[int]:
    """CUDA's numbers of the GPUs to hand out. Raises LaunchError."""
    if profile.gpus_per_node is not None:
        return list(range(profile.gpus_per_node))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(range(len(list(Path("/dev").glob("nvidia[0-9]*")))))
    try:
        return [int(number) for number in visible.split(",") if number.strip()]
    except ValueError:
        raise LaunchError(f"CUDA_VISIBLE_DEVICES={visible!r}: give the GPUs by their numbers, not by names") from None


@dataclass
class Room:
    """What of this machine no job has: places for jobs (None: any number), cores, and GPUs by number."""

    places: int | None
    cores: int
    gpus: list[int]

    def fits(self, asked: Resources, idle: bool) -> bool:
        """A job that wants more cores than there are runs all the same, alone."""
        return (
            (self.places is None or self.places > 0)
            and (idle or self.cores >= cores_of(asked))
            and len(self.gpus) >= asked.gpus
        )

    def take(self, asked: Resources) -> list[int]:
        """The job's GPUs."""
        self.cores -= cores_of(asked)
        self.places = None if self.places is None else self.places - 1
        mine, self.gpus = self.gpus[: asked.gpus], self.gpus[asked.gpus :]
        return mine

    def give_back(self, asked: Resources, gpus: Sequence[int]) -> None:
        self.cores += cores_of(asked)
        self.places = None if self.places is None else self.places + 1
        self.gpus = sorted([*self.gpus, *gpus])


def cores_of(asked: Resources) -> int:
    return asked.tasks_per_node * asked.cpus


def run_here(frozen: Frozen, arrays: Sequence[Array], tell: Tell) -> None:
    """Run jobs here until all have ended, parents first."""
    _note_waiting(frozen, arrays)
    room = Room(frozen.profile.parallel, cores_here(), gpus_here(frozen.profile))
    todo = [(array, i) for array in arrays for i in range(len(array.bundles))]
    share = _sharers(arrays, room)
    running: dict[tuple[int, int], tuple[Any, Resources, list[int]]] = {}
    ended: set[tuple[int, int]] = set()
    os.environ[RUNNER] = str(os.getpid())
    while todo or running:
        for key in [key for key, (job, _, _) in running.items() if job.done()]:
            room.give_back(*running.pop(key)[1:])
            ended.add(key)
        for array, i in list(todo):
            waits = array.after is not None and (id(array.after), i) not in ended
            if waits or not room.fits(array.resources, idle=not running):
                continue
            gpus = room.take(array.resources)
            os.environ[CONCURRENT_RUNS] = str(share(array.resources))
            job = _start(frozen, array, array.bundles[i], gpus)
            running[id(array), i] = job, array.resources, gpus
            todo.remove((array, i))
            append_submission(frozen.root, array.stage, {n.name: job_here(job.job_id) for n in array.bundles[i]})
            tell(f"{' '.join(node.name for node in array.bundles[i])}: process {job.job_id}")
        time.sleep(0.1)


def run_in_turn(frozen: Frozen, arrays: Sequence[Array], tell: Tell) -> None:
    """Watched by this process, one job after the other. (submitit's debug executor ends in a debugger.)"""
    _note_waiting(frozen, arrays)
    for array in arrays:
        for bundle in array.bundles:
            append_submission(frozen.root, array.stage, {node.name: job_here(os.getpid()) for node in bundle})
            tell(" ".join(node.name for node in bundle))
            try:
                worker.STAGES[array.stage](*arguments_of(frozen, bundle))
            except SystemExit:  # it failed, as its record says; the others go on
                continue


def _sharers(arrays: Sequence[Array], room: Room) -> Callable[[Resources], int]:
    """Among how many jobs the machine is shared: the threads of all that fit are never more than its cores."""
    cores, places, gpus = room.cores, room.places, len(room.gpus)
    waited_for = {id(array.after) for array in arrays}
    first = sum(len(array.bundles) for array in arrays if array.after is None)
    last = sum(len(array.bundles) for array in arrays if id(array) not in waited_for)
    alike = len({(cores_of(array.resources), array.resources.gpus) for array in arrays}) == 1

    def sharers(asked: Resources) -> int:
        most = [-(-cores // cores_of(asked))]
        most += [places] if places is not None else []
        if alike:  # where they ask for different things, what one leaves unused is another's
            most += [max(first, last), *([gpus // asked.gpus] if asked.gpus else [])]
        return max(1, min(most))

    return sharers


def _note_waiting(frozen: Frozen, arrays: Sequence[Array]) -> None:
    """So that whoever looks meanwhile sees what waits for this process."""
    for array in arrays:
        append_submission(frozen.root, array.stage, {n.name: queue_here() for b in array.bundles for n in b})


def _start(frozen: Frozen, array: Array, bundle: Bundle, gpus: Sequence[int]) -> Any:
    from submitit.local.local import LocalExecutor

    profile, asked = frozen.profile, array.resources
    executor = LocalExecutor(private_folder(frozen.root / JOBS), python=profile.python)
    setup = [*(f"export {k}={shlex.quote(v)}" for k, v in profile.environment.items()), *profile.setup]
    executor.update_parameters(
        timeout_min=asked.minutes,
        tasks_per_node=asked.tasks_per_node,
        gpus_per_node=len(gpus),
        visible_gpus=list(gpus),
        signal_delay_s=profile.signal_s,
        **({"setup": setup} if setup else {}),
    )
    with _out_of_reach_of_ctrl_c():
        return executor.submit(worker.STAGES[array.stage], *arguments_of(frozen, bundle))


@contextmanager
def _out_of_reach_of_ctrl_c() -> Iterator[None]:
    """For processes that are started in the block, until they say otherwise: submitit's kill what should save."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
