"""Slurm's commands: each is called once, however many jobs there are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import LaunchError

_JOB = re.compile(r"\d+(_\d+)?")
_ARRAY = re.compile(r"(?P<job>\d+)_\[(?P<ranges>[\d,-]+)(?:%\d+)?\]")


@dataclass(frozen=True)
class JobState:
    """Slurm's state of a job (PENDING, RUNNING, TIMEOUT ...) and the reason that it gives."""

    state: str
    reason: str


def require(command: str) -> None:
    """Raises LaunchError if a command of Slurm is not installed."""
    if shutil.which(command) is None:
        raise LaunchError(
            f"{command} is not on PATH: this machine has no Slurm (on clusters, often `module load slurm`); "
            "use --cluster local to run here"
        )


def is_job(job: str) -> bool:
    """Whether this is a job id of Slurm: `123` or `123_4`."""
    return _JOB.fullmatch(job) is not None


def queue(jobs: Iterable[str], user: int) -> dict[str, JobState]:
    """The state of those of a user's jobs that are pending or running. Raises LaunchError if squeue fails."""
    wanted = {job.partition("_")[0] for job in jobs}
    if not wanted:
        return {}
    require("squeue")
    # all of the user's jobs: with --jobs=..., an id that squeue does not know any more would be an error
    answer = _run(["squeue", "--noheader", f"--user={user}", "--format=%i|%T|%r"])
    return {j: s for j, s in _states(answer).items() if j.partition("_")[0] in wanted}


def accounting(jobs: Iterable[str], user: int) -> dict[str, JobState]:
    """The last state of those of a user's jobs that have left the queue; {} where Slurm keeps no accounting."""
    wanted = sorted({job.partition("_")[0] for job in jobs})
    if not wanted or shutil.which("sacct") is None:
        return {}
    command = [
        "sacct",
        "--noheader",
        "--allocations",
        "--parsable2",
        "--format=JobID,State,Reason",
        "--starttime=1970-01-01",
        f"--user={user}",
    ]
    try:
        return _states(_run([*command, f"--jobs={','.join(wanted)}"]))
    except LaunchError:  # no accounting, which the caller says for each job
        return {}


def facts(job: str) -> dict[str, str]:
    """`scontrol show job` as key -> value; {} if Slurm does not know the job any more."""
    try:
        answer = _run(["scontrol", "--oneliner", "show", "job", job])
    except LaunchError:
        return {}
    return dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(\S*)", answer.splitlines()[0])) if answer else {}


def requeue(job: str) -> None:
    """Put a running job back into the queue. Raises LaunchError with Slurm's message."""
    _run(["scontrol", "requeue", job])


def cancel(jobs: Iterable[str]) -> None:
    """Raises LaunchError with Slurm's message."""
    wanted = sorted(set(jobs))
    for i in range(0, len(wanted), 500):
        _run(["scancel", *wanted[i : i + 500]])


def own_job() -> str:
    """The id of this process's job. In an array it is that of the task: SLURM_JOB_ID may mean the whole array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def _states(text: str) -> dict[str, JobState]:
    """Lines of `id|state|reason`; `12_[3-5,7%2]` stands for several jobs."""
    states: dict[str, JobState] = {}
    for line in text.splitlines():
        job, state, reason = (*line.split("|", 2), "", "")[:3]
        found = JobState(state.split()[0] if state else "", reason)
        array = _ARRAY.fullmatch(job)
        if not array:
            states[job] = found
            continue
        for part in array["ranges"].split(","):
            first, _, last = part.partition("-")
            states.update({f"{array['job']}_{i}": found for i in range(int(first), int(last or first) + 1)})
    return states


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise LaunchError(f"{' '.join(command[:2])} failed: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout
