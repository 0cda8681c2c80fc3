"""What a job of a grid runs: the stages of the command line, each in a process of its own.

The job survives the signals that Slurm sends before a time limit or a preemption, so that the stage can save and
exit. Rank 0 then requeues the job, and the stage resumes from its newest checkpoint. Without Slurm, the job also ends
when the process that runs the grid ends. Nothing here imports torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from .. import parts
from ..environment import CONCURRENT_RUNS, code_commit
from ..errors import LaunchError, Preempted
from . import slurm
from .folder import FrozenGrid, FrozenNode, NodeRecord, load, read_record, write_record
from .job_environment import JobEnvironment, read_job_environment

LOCAL_REQUEUE = 144
"""Exit code with which a job makes submitit's local executor start it again."""


@dataclass
class NodeProcess:
    """One node in this job: its record, which rank 0 writes, and its process; None if there is nothing to run."""

    node: FrozenNode
    record: NodeRecord
    process: subprocess.Popen[bytes] | None


def run_nodes(stage: str, config: str | list[str], folder: str | list[str], code: Sequence[str] = ()) -> None:
    """Run the stage of one node, or of several at once where they are packed into one job.

    config, folder: paths of the node's configuration and run folder, or lists of them. code: import paths that
    whoever submitted has allowed. Exits through sys.exit unless a node is done.
    """
    parts.allow(code, "the submitted job")
    configs = [Path(c) for c in ([config] if isinstance(config, str) else config)]
    folders = [Path(f) for f in ([folder] if isinstance(folder, str) else folder)]
    frozen, job = load(configs[0].parent.parent), read_job_environment()
    job.variables[CONCURRENT_RUNS] = str(len(configs) * int(job.variables.get(CONCURRENT_RUNS, "1")))
    with _catch_signals(job) as received:
        nodes = [_start(frozen, f"{c.stem}.{stage}", c, f, job) for c, f in zip(configs, folders, strict=True)]
        _wait(frozen, nodes, received, job)
        outcomes = [_finish(frozen, node, bool(received), job) for node in nodes]
        if "requeue" in outcomes:
            _requeue(frozen, nodes, outcomes, job)
    if all(outcome in ("failed", "blocked", "cancelled") for outcome in outcomes):
        sys.exit(1)  # one node that is done lets a packed job succeed: later stages check the record of their parent


def _wait(frozen: FrozenGrid, nodes: list[NodeProcess], received: list[int], job: JobEnvironment) -> None:
    """Wait until every process has ended; after a signal, for most of `signal_s` at most."""
    processes = [node.process for node in nodes if node.process is not None]
    deadline: float | None = None
    try:
        while any(process.poll() is None for process in processes):
            if job.runner_has_exited() and not received:
                received.append(signal.SIGINT)
            if received and deadline is None:
                deadline = time.monotonic() + 0.8 * frozen.profile.signal_s
                if received[0] == signal.SIGINT:
                    _record_cancelled(frozen, nodes, job)
                if job.scheduler != "slurm":  # Slurm sends its signals to every process of the job
                    _forward(signal.SIGTERM if received[0] == signal.SIGINT else received[0], processes)
            if deadline is not None and time.monotonic() > deadline:
                break  # a job that reaches the time limit has failed, and Slurm cancels the jobs that depend on it
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    if any(process.returncode < 0 for process in processes):
        time.sleep(0.5)  # a signal that killed the stage may be about to arrive here too


def _record_cancelled(frozen: FrozenGrid, nodes: list[NodeProcess], job: JobEnvironment) -> None:
    for node in nodes:
        if node.process is not None and node.process.poll() is None:
            node.record.outcome, node.record.error = "cancelled", "the process that ran the grid was stopped"
            if job.rank == 0:
                write_record(frozen.root, node.node.name, node.record)


@contextmanager
def _catch_signals(job: JobEnvironment) -> Iterator[list[int]]:
    """Inside, the signals that would end this process are only appended to the list."""
    received: list[int] = []

    def handler(number: int, _: FrameType | None) -> None:
        received.append(number)

    numbers = [signal.SIGTERM, signal.SIGUSR2, *([signal.SIGINT] if job.scheduler == "local" else [])]
    old_handlers = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield received
    finally:
        for number, old_handler in old_handlers.items():
            signal.signal(number, old_handler)


def _forward(number: int, processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _start(frozen: FrozenGrid, name: str, config: Path, folder: Path, job: JobEnvironment) -> NodeProcess:
    """Start a node's process, unless the node is done already or its parent is not."""
    node = frozen.nodes[name]
    old = read_record(frozen.root, name)
    if old is not None and old.outcome == "done" and folder.is_dir():
        return NodeProcess(node, old, None)
    record = NodeRecord("running", job.id, socket.gethostname(), os.getpid(), round(time.time(), 1))
    record.commit, record.requeues = code_commit() if job.rank == 0 else "", old.requeues if old else []
    parent = read_record(frozen.root, node.parent) if node.parent else None
    if node.parent and (parent is None or parent.outcome != "done"):
        record.outcome, record.error = "blocked", f"{node.parent} is not done"
    own = [entry for entry in record.requeues if entry["job"] == job.id]
    if job.restarts > len(own):  # more restarts than this node asked for
        record.requeues.append(_requeue_entry("requeued by the scheduler", job))
    if job.rank == 0:
        write_record(frozen.root, name, record)
    if record.outcome == "blocked":
        return NodeProcess(node, record, None)
    target = [str(config if node.stage == "pretrain" else folder)]
    target += [text for name in frozen.code for text in ("--allow-code", name)]
    if node.stage != "probe":  # a probe has no checkpoints to resume from
        target.append("--resume")
    with _log_path(frozen.root, name, job.rank).open("ab") as log:
        if record.commit and record.commit != frozen.commit:
            log.write(f"note: the code is at {record.commit}, the grid was frozen at {frozen.commit}\n".encode())
            log.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "hpc_supcon", node.stage, *target],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=job.variables,
            # not directly reached by Ctrl-C: this process forwards it as a signal after which the stage saves
            start_new_session=(job.scheduler == "local"),
        )
    return NodeProcess(node, record, process)


def _finish(frozen: FrozenGrid, node: NodeProcess, is_signaled: bool, job: JobEnvironment) -> str:
    """Record how a node ended and return its outcome, or "requeue" without recording it."""
    if node.process is None or (node.process.returncode and node.record.outcome == "cancelled"):
        return node.record.outcome
    code, root, name = node.process.returncode, frozen.root, node.node.name
    node.record.ended = round(time.time(), 1)
    if code and (code == Preempted.exit_code or is_signaled):
        return "requeue"
    if code:
        how = f"killed by {signal.Signals(-code).name}: " if code < 0 else ""
        node.record.error = how + (_last_line(_log_path(root, name, job.rank)) or f"exit code {code}")
        if job.rank:
            _failure_file(root, name, job).write_text(f"rank {job.rank}: {node.record.error}", encoding="utf-8")
    node.record.outcome = "failed" if code else "done"
    node.record.error = node.record.error if code else ""
    if job.rank == 0:
        write_record(root, name, node.record)
    return node.record.outcome


def _requeue(frozen: FrozenGrid, nodes: list[NodeProcess], outcomes: list[str], job: JobEnvironment) -> None:
    """On rank 0: requeue the job, unless it was cancelled, another rank failed, or max_requeues is reached."""
    if job.rank:
        sys.exit(0)  # a nonzero exit code would end the job before rank 0 has requeued it
    waiting = [node for node, outcome in zip(nodes, outcomes, strict=True) if outcome == "requeue"]
    facts = slurm.facts(job.id) if job.scheduler == "slurm" else {}
    state, limit = facts.get("JobState", ""), frozen.profile.max_requeues
    if job.scheduler == "slurm" and state != "RUNNING" and facts.get("Reason") != "TimeLimit":
        # cancelled, or requeued by Slurm itself: both show as COMPLETING, and Slurm decides
        for node in waiting:
            write_record(frozen.root, node.node.name, node.record)
        sys.exit(Preempted.exit_code)
    outcome, error = ("failed", "interrupted") if job.scheduler == "debug" else ("requeued", "")
    for node in waiting:
        failure = _failure_file(frozen.root, node.node.name, job)
        node.record.outcome, node.record.error = outcome, error
        if failure.exists():
            node.record.outcome, node.record.error = "failed", failure.read_text(encoding="utf-8")
        elif outcome == "requeued" and len(node.record.requeues) >= limit:
            node.record.outcome = "failed"
            node.record.error = f"requeued {limit} times (max_requeues), not requeued again"
        if node.record.outcome == "requeued":
            node.record.requeues.append(_requeue_entry(_reason(facts, frozen.profile.signal_s), job))
        write_record(frozen.root, node.node.name, node.record)
    if not any(node.record.outcome == "requeued" for node in waiting):
        sys.exit(1)
    if job.scheduler == "local":
        sys.exit(LOCAL_REQUEUE)
    try:
        slurm.requeue(job.id)
    except LaunchError as error_of_slurm:
        sys.stderr.write(f"{error_of_slurm}\n")
    sys.exit(Preempted.exit_code)


def _requeue_entry(reason: str, job: JobEnvironment) -> dict[str, object]:
    return {"time": round(time.time(), 1), "reason": reason, "job": job.id}


def _reason(facts: dict[str, str], signal_s: int) -> str:
    """Why Slurm sent a signal, from `scontrol show job`."""
    if facts.get("PreemptTime", "None") not in ("None", "N/A", ""):
        return "preempted"
    try:
        left = time.mktime(time.strptime(facts.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S")) - time.time()
    except ValueError:
        return "received a signal"
    return "time limit" if left < signal_s + 60 else "received a signal"


def _log_path(root: Path, node: str, rank: int) -> Path:
    return root / "logs" / (f"{node}.log" if rank == 0 else f"{node}.rank-{rank}.log")


def _failure_file(root: Path, node: str, job: JobEnvironment) -> Path:
    """Where another rank than 0 writes that it failed in this start of the job, before srun kills the others."""
    return root / "records" / f"{node}.{job.id}.{job.restarts}.failed"


def _last_line(log: Path) -> str:
    """The last line that is not empty."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
