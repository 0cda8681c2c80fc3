"""The state of every node, from its record, the scheduler and its run folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import LaunchError
from . import slurm
from .folder import JOBS, FrozenGrid, FrozenNode, NodeRecord, read_records, submitted_jobs, write_record
from .slurm import JobState

QUEUED = ("pending", "running")
"""States of nodes whose job has not ended: they are never submitted again."""
FAILED = ("failed", "lost", "blocked")
UNFINISHED = ("missing", "cancelled", *FAILED)
_TAIL_BYTES = 16384


@dataclass(frozen=True)
class NodeState:
    """missing | pending | running | done | failed | blocked | cancelled | lost, and details for `grid status`."""

    state: str
    detail: str = ""
    job: str = ""
    requeues: int = 0


def node_states(frozen: FrozenGrid) -> dict[str, NodeState]:
    """State of every node. Calls squeue once, and sacct once if jobs left the queue without recording an outcome.

    Raises LaunchError if squeue fails.
    """
    jobs, records = submitted_jobs(frozen.root), read_records(frozen.root)
    owner = (frozen.root / JOBS).stat().st_uid
    folders = {entry.name for entry in os.scandir(frozen.root / "runs")}
    done = {name for name, r in records.items() if r.outcome == "done" and _folder_of(frozen, name) in folders}
    open_jobs = {n: jobs[n] for n in frozen.nodes if n in jobs and n not in done and slurm.is_job(jobs[n])}
    queued = slurm.queue(open_jobs.values(), owner)
    unknown = {job for n, job in open_jobs.items() if job not in queued and not _has_outcome(records.get(n), job)}
    ended = slurm.accounting(unknown, owner)
    states: dict[str, NodeState] = {}
    for name, node in frozen.nodes.items():
        state = NodeState("done") if name in done else _state(node, jobs, records, queued, ended)
        if state.state == "cancelled" and node.parent and states[node.parent].state in UNFINISHED:
            state = replace(state, state="blocked", detail=f"{node.parent} is {states[node.parent].state}")
        record = records.get(name)
        states[name] = replace(state, job=jobs.get(name, ""), requeues=len(record.requeues) if record else 0)
    return states


def _folder_of(frozen: FrozenGrid, name: str) -> str:
    return frozen.nodes[name].folder if name in frozen.nodes else ""


def _has_outcome(record: NodeRecord | None, job: str) -> bool:
    return record is not None and record.job == job and record.outcome not in ("running", "requeued")


def _state(
    node: FrozenNode,
    jobs: Mapping[str, str],
    records: Mapping[str, NodeRecord],
    queued: Mapping[str, JobState],
    ended: Mapping[str, JobState],
) -> NodeState:
    record, job = records.get(node.name), jobs.get(node.name)
    if job is None:
        return NodeState("missing", "not submitted")
    if record is not None and record.outcome == "done":
        return NodeState("missing", "its run folder was deleted")
    if job in queued:
        return _queued_state(queued[job], record)
    if record is not None and _has_outcome(record, job):
        return NodeState(record.outcome, record.error)
    return _ended_state(ended.get(job)) if slurm.is_job(job) else _local_state(record, job)


def _queued_state(found: JobState, record: NodeRecord | None) -> NodeState:
    if found.state == "PENDING":
        requeued = f", {record.requeues[-1]['reason']}" if record and record.requeues else ""
        return NodeState("pending", found.reason + requeued)
    return NodeState("running", "" if found.state == "RUNNING" else found.state.lower())


def _local_state(record: NodeRecord | None, job: str) -> NodeState:
    """Of a job without Slurm: host:pid, or queue:host:pid of the process in which it waits."""
    *waits, host, pid = job.split(":")
    if waits:
        if _has_exited(host, pid):
            return NodeState("missing", "the process in which it waited has exited")
        return NodeState("pending", f"waits in process {pid} on {host}")
    if record is not None and record.job == job:
        exited = _has_exited(record.host, record.pid)
        return NodeState("lost", "its process has exited") if exited else NodeState("running")
    return NodeState("lost", "ended without a record") if _has_exited(host, pid) else NodeState("pending", "starting")


def _has_exited(host: str, pid: int | str) -> bool:
    """False for processes of other hosts, about which nothing is known."""
    return host == socket.gethostname() and not Path(f"/proc/{pid}").exists()


def _ended_state(found: JobState | None) -> NodeState:
    if found is None:
        return NodeState("lost", "not in the queue, and sacct has no entry for it (no accounting?)")
    if found.state.startswith("CANCELLED"):
        return NodeState("cancelled", found.reason if found.reason != "None" else "")
    if found.state in ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"):
        return NodeState("failed", found.state.lower().replace("_", " "))
    if found.state == "COMPLETED":
        return NodeState("lost", "completed without a record")
    # accounting lags behind the queue by seconds
    return NodeState("pending" if found.state == "PENDING" else "running", f"sacct says {found.state.lower()}")


def progress(frozen: FrozenGrid, node: FrozenNode) -> dict[str, Any]:
    """The newest training line of a run folder's metrics.jsonl: step, images_per_s, time_left_s; {} without one."""
    try:
        with (frozen.run_folder(node) / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:  # the first line may be cut off, the last one half written
            continue
        if isinstance(event, dict) and event.get("event") == "train":
            return event
    return {}


def cancel(frozen: FrozenGrid, names: set[str]) -> list[str]:
    """Cancel the jobs of these nodes that are pending or running; returns the nodes whose jobs were cancelled.

    Raises LaunchError if Slurm does not cancel them, or if they are run by a process without Slurm.
    """
    states = node_states(frozen)
    found = [name for name in frozen.nodes if name in names and states[name].state in QUEUED]
    if not all(slurm.is_job(states[name].job) for name in found):
        raise LaunchError(f"{frozen.root}: runs in the terminal that started it; press Ctrl-C there")
    every = {name for name, state in states.items() if state.state in QUEUED}
    if set(found) == every:  # whole arrays: fewer arguments for scancel
        slurm.cancel(states[name].job.partition("_")[0] for name in found)
    else:
        slurm.cancel(states[name].job for name in found)
    records = read_records(frozen.root)
    for name in found:
        if states[name].state == "pending":  # accounting may have no entry for a task that never started
            old = records.get(name)
            requeues = old.requeues if old is not None else []
            write_record(frozen.root, name, NodeRecord("cancelled", states[name].job, requeues=requeues))
    return found
