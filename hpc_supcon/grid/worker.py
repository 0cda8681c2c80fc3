"""What a job of a grid runs: the command line's own stage, in a process of its own, until it is done.

The job itself only watches. It survives the signals that Slurm sends before a time limit or a pre-emption, so
that the stage can save and leave; then rank 0 puts the job back into the queue, and the stage goes on from its
newest checkpoint. Without Slurm, the job also leaves when the process that runs the grid is gone. Nothing here
imports torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..environment import CONCURRENT_RUNS
from ..errors import LaunchError, Preempted
from . import slurm
from .folder import Frozen, FrozenNode, Record, code_commit, load, read_record, write_record
from .job_environment import Place, find_place

LOCAL_START_AGAIN = 144
"""Exit code that makes submitit's local executor start the job again."""


def pretrain(config: str | list[str], folder: str | list[str]) -> None:
    _work("pretrain", config, folder)


def probe(config: str | list[str], folder: str | list[str]) -> None:
    _work("probe", config, folder)


def prune(config: str | list[str], folder: str | list[str]) -> None:
    _work("prune", config, folder)


STAGES = {"pretrain": pretrain, "probe": probe, "prune": prune}


@dataclass
class Task:
    """One node in this job: its record (rank 0 writes it) and its process, None when there is nothing to do."""

    node: FrozenNode
    record: Record
    process: subprocess.Popen[bytes] | None


def _work(stage: str, config: str | list[str], folder: str | list[str]) -> None:
    """Run one node, or several at once (packed); leaves through sys.exit unless all are done."""
    configs = [Path(c) for c in ([config] if isinstance(config, str) else config)]
    folders = [Path(f) for f in ([folder] if isinstance(folder, str) else folder)]
    frozen, place = load(configs[0].parent.parent), find_place()
    place.environment[CONCURRENT_RUNS] = str(len(configs) * int(place.environment.get(CONCURRENT_RUNS, "1")))
    with _listening(place) as told:
        tasks = [_begin(frozen, f"{c.stem}.{stage}", c, f, place) for c, f in zip(configs, folders, strict=True)]
        _watch(frozen, tasks, told, place)
        outcomes = [_end(frozen, task, bool(told), place) for task in tasks]
        if "again" in outcomes:
            _leave_and_start_again(frozen, tasks, outcomes, place)
    if all(outcome in ("failed", "blocked", "cancelled") for outcome in outcomes):
        sys.exit(1)  # one that is done lets the packed job succeed; stages after it ask for their own parent


def _watch(frozen: Frozen, tasks: list[Task], told: list[int], place: Place) -> None:
    """Until every process has ended; for a part of `signal_s` from when they were told to leave."""
    processes = [task.process for task in tasks if task.process is not None]
    until: float | None = None
    try:
        while any(process.poll() is None for process in processes):
            if place.deserted() and not told:
                told.append(signal.SIGINT)
            if told and until is None:
                until = time.monotonic() + 0.8 * frozen.profile.signal_s
                if told[0] == signal.SIGINT:
                    _note_cancelled(frozen, tasks, place)
                if place.scheduler != "slurm":  # Slurm tells every process of the job by itself
                    _pass_on(signal.SIGTERM if told[0] == signal.SIGINT else told[0], processes)
            if until is not None and time.monotonic() > until:
                break  # at the limit itself the job would count as failed, and Slurm cancel what waits for it
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    if any(process.returncode < 0 for process in processes):
        time.sleep(0.5)  # whoever killed the stage may be about to tell this process too


def _note_cancelled(frozen: Frozen, tasks: list[Task], place: Place) -> None:
    for task in tasks:
        if task.process is not None and task.process.poll() is None:
            task.record.outcome, task.record.error = "cancelled", "the process that ran the grid was stopped"
            if place.rank == 0:
                write_record(frozen.root, task.node.name, task.record)


@contextmanager
def _listening(place: Place) -> Iterator[list[int]]:
    """Survive being told to stop, for the block; the list fills with what was said."""
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        told.append(number)

    numbers = [signal.SIGTERM, signal.SIGUSR2, *([signal.SIGINT] if place.scheduler == "local" else [])]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(number: int, processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _begin(frozen: Frozen, name: str, config: Path, folder: Path, place: Place) -> Task:
    """Start a node's process, unless it is done already or what it needs is not."""
    node = frozen.nodes[name]
    old = read_record(frozen.root, name)
    if old is not None and old.outcome == "done" and folder.is_dir():
        return Task(node, old, None)
    record = Record("running", place.job, socket.gethostname(), os.getpid(), round(time.time(), 1))
    record.commit, record.requeues = code_commit() if place.rank == 0 else "", old.requeues if old else []
    parent = read_record(frozen.root, node.parent) if node.parent else None
    if node.parent and (parent is None or parent.outcome != "done"):
        record.outcome, record.error = "blocked", f"{node.parent} is not done"
    own = [entry for entry in record.requeues if entry["job"] == place.job]
    if place.restarts > len(own):  # not asked for by this node: the scheduler did it by itself
        record.requeues.append(_requeue_entry("requeued by the scheduler", place))
    if place.rank == 0:
        write_record(frozen.root, name, record)
    if record.outcome == "blocked":
        return Task(node, record, None)
    target = [str(config if node.stage == "pretrain" else folder)]
    if node.stage != "probe":  # which begins anew, and has nothing to go on from
        target.append("--resume")
    with _log(frozen.root, name, place.rank).open("ab") as log:
        if record.commit and record.commit != frozen.commit:
            log.write(f"note: the code is at {record.commit}, the grid was frozen at {frozen.commit}\n".encode())
            log.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "hpc_supcon", node.stage, *target],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=place.environment,
            # Ctrl-C shall reach it through this process, which lets it save
            start_new_session=(place.scheduler == "local"),
        )
    return Task(node, record, process)


def _end(frozen: Frozen, task: Task, told: bool, place: Place) -> str:
    """What became of a node: done, failed, blocked, cancelled, or "again"."""
    if task.process is None or (task.process.returncode and task.record.outcome == "cancelled"):
        return task.record.outcome
    code, root, name = task.process.returncode, frozen.root, task.node.name
    task.record.ended = round(time.time(), 1)
    if code and (code == Preempted.exit_code or told):
        return "again"
    if code:
        how = f"killed by {signal.Signals(-code).name}: " if code < 0 else ""
        task.record.error = how + (_last_line(_log(root, name, place.rank)) or f"exit code {code}")
        if place.rank:
            _failure(root, name, place).write_text(f"rank {place.rank}: {task.record.error}", encoding="utf-8")
    task.record.outcome = "failed" if code else "done"
    task.record.error = task.record.error if code else ""
    if place.rank == 0:
        write_record(root, name, task.record)
    return task.record.outcome


def _leave_and_start_again(frozen: Frozen, tasks: list[Task], outcomes: list[str], place: Place) -> None:
    """Rank 0 puts the job back into the queue, unless it was cancelled, another rank failed, or it was too often."""
    if place.rank:
        sys.exit(0)  # an error here would end the job before rank 0 has spoken
    waiting = [task for task, outcome in zip(tasks, outcomes, strict=True) if outcome == "again"]
    facts = slurm.facts(place.job) if place.scheduler == "slurm" else {}
    state, limit = facts.get("JobState", ""), frozen.profile.max_requeues
    if place.scheduler == "slurm" and state != "RUNNING" and facts.get("Reason") != "TimeLimit":
        # cancelled, or back in the queue without our help: both show as COMPLETING, and Slurm has the last word
        for task in waiting:
            write_record(frozen.root, task.node.name, task.record)
        sys.exit(Preempted.exit_code)
    outcome, error = ("failed", "interrupted") if place.scheduler == "debug" else ("requeued", "")
    for task in waiting:
        broken = _failure(frozen.root, task.node.name, place)
        task.record.outcome, task.record.error = outcome, error
        if broken.exists():
            task.record.outcome, task.record.error = "failed", broken.read_text(encoding="utf-8")
        elif outcome == "requeued" and len(task.record.requeues) >= limit:
            task.record.outcome, task.record.error = "failed", f"requeued {limit} times (max_requeues), given up"
        if task.record.outcome == "requeued":
            task.record.requeues.append(_requeue_entry(_why(facts, frozen.profile.signal_s), place))
        write_record(frozen.root, task.node.name, task.record)
    if not any(task.record.outcome == "requeued" for task in waiting):
        sys.exit(1)
    if place.scheduler == "local":
        sys.exit(LOCAL_START_AGAIN)
    try:
        slurm.requeue(place.job)
    except LaunchError as refused:
        sys.stderr.write(f"{refused}\n")
    sys.exit(Preempted.exit_code)


def _requeue_entry(reason: str, place: Place) -> dict[str, object]:
    return {"time": round(time.time(), 1), "reason": reason, "job": place.job}


def _why(facts: dict[str, str], signal_s: int) -> str:
    """Why Slurm wants the job to leave, from `scontrol show job`."""
    if facts.get("PreemptTime", "None") not in ("None", "N/A", ""):
        return "pre-empted"
    try:
        left = time.mktime(time.strptime(facts.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S")) - time.time()
    except ValueError:
        return "asked to leave"
    return "time limit" if left < signal_s + 60 else "asked to leave"


def _log(root: Path, node: str, rank: int) -> Path:
    return root / "logs" / (f"{node}.log" if rank == 0 else f"{node}.rank-{rank}.log")


def _failure(root: Path, node: str, place: Place) -> Path:
    """Where another rank says that it failed in this start of the job, before srun kills the rest."""
    return root / "records" / f"{node}.{place.job}.{place.restarts}.failed"


def _last_line(log: Path) -> str:
    """The last line with something in it."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
