"""Where every node stands: its record, the scheduler's word, and what its run folder shows."""

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
from .folder import JOBS, Frozen, FrozenNode, Record, read_records, submitted, write_record
from .slurm import JobState

WAITING = ("pending", "running")
"""States of nodes that the scheduler still has: never submitted again."""
FAILED = ("failed", "lost", "blocked")
UNFINISHED = ("missing", "cancelled", *FAILED)
_TAIL = 16384


@dataclass(frozen=True)
class NodeState:
    """missing | pending | running | done | failed | blocked | cancelled | lost, with what there is to say."""

    state: str
    detail: str = ""
    job: str = ""
    requeues: int = 0


def node_states(frozen: Frozen) -> dict[str, NodeState]:
    """State of every node. One call of squeue, and one of sacct if jobs left the queue without a word.

    Raises LaunchError when Slurm does not answer.
    """
    jobs, records = submitted(frozen.root), read_records(frozen.root)
    owner = (frozen.root / JOBS).stat().st_uid
    folders = {entry.name for entry in os.scandir(frozen.root / "runs")}
    done = {name for name, r in records.items() if r.outcome == "done" and _folder_of(frozen, name) in folders}
    open_jobs = {n: jobs[n] for n in frozen.nodes if n in jobs and n not in done and slurm.is_job(jobs[n])}
    waiting = slurm.queue(open_jobs.values(), owner)
    silent = {job for n, job in open_jobs.items() if job not in waiting and _unsettled(records.get(n), job)}
    ended = slurm.accounting(silent, owner)
    states: dict[str, NodeState] = {}
    for name, node in frozen.nodes.items():
        state = NodeState("done") if name in done else _state(node, jobs, records, waiting, ended)
        if state.state == "cancelled" and node.parent and states[node.parent].state in UNFINISHED:
            state = replace(state, state="blocked", detail=f"{node.parent} is {states[node.parent].state}")
        record = records.get(name)
        states[name] = replace(state, job=jobs.get(name, ""), requeues=len(record.requeues) if record else 0)
    return states


def _folder_of(frozen: Frozen, name: str) -> str:
    return frozen.nodes[name].folder if name in frozen.nodes else ""


def _unsettled(record: Record | None, job: str) -> bool:
    return record is None or record.job != job or record.outcome in ("running", "requeued")


def _state(
    node: FrozenNode,
    jobs: Mapping[str, str],
    records: Mapping[str, Record],
    waiting: Mapping[str, JobState],
    ended: Mapping[str, JobState],
) -> NodeState:
    record, job = records.get(node.name), jobs.get(node.name)
    if job is None:
        return NodeState("missing", "not submitted")
    if record is not None and record.outcome == "done":
        return NodeState("missing", "its run folder was deleted")
    if job in waiting:
        return _in_queue(waiting[job], record)
    if not _unsettled(record, job):
        assert record is not None
        return NodeState(record.outcome, record.error)
    return _left_queue(ended.get(job)) if slurm.is_job(job) else _here(record, job)


def _in_queue(found: JobState, record: Record | None) -> NodeState:
    if found.state == "PENDING":
        again = f", {record.requeues[-1]['reason']}" if record and record.requeues else ""
        return NodeState("pending", found.reason + again)
    return NodeState("running", "" if found.state == "RUNNING" else found.state.lower())


def _here(record: Record | None, job: str) -> NodeState:
    *waits, host, pid = job.split(":")
    if waits:
        if _gone(host, pid):
            return NodeState("missing", "the terminal it waited in is gone")
        return NodeState("pending", f"waits in process {pid} on {host}")
    if record is not None and record.job == job:
        gone = _gone(record.host, record.pid)
        return NodeState("lost", "its process is gone") if gone else NodeState("running")
    return NodeState("lost", "ended without a word") if _gone(host, pid) else NodeState("pending", "starting")


def _gone(host: str, pid: int | str) -> bool:
    """Only of processes on this host can that be known."""
    return host == socket.gethostname() and not Path(f"/proc/{pid}").exists()


def _left_queue(found: JobState | None) -> NodeState:
    if found is None:
        return NodeState("lost", "not in the queue, and sacct knows nothing of it (no accounting?)")
    if found.state.startswith("CANCELLED"):
        return NodeState("cancelled", found.reason if found.reason != "None" else "")
    if found.state in ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"):
        return NodeState("failed", found.state.lower().replace("_", " "))
    if found.state == "COMPLETED":
        return NodeState("lost", "completed without an outcome")
    # accounts lag behind the queue by seconds
    return NodeState("pending" if found.state == "PENDING" else "running", f"sacct says {found.state.lower()}")


def progress(frozen: Frozen, node: FrozenNode) -> dict[str, Any]:
    """The newest training line of a run folder's metrics.jsonl: step, images_per_s, time_left_s; {} without one."""
    try:
        with (frozen.run_folder(node) / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:  # the first line may be cut, the last one half written
            continue
        if isinstance(event, dict) and event.get("event") == "train":
            return event
    return {}


def cancel(frozen: Frozen, names: set[str]) -> list[str]:
    """Cancel the jobs of these nodes that wait or run; returns the nodes whose jobs were cancelled.

    Raises LaunchError when Slurm refuses, or where the grid runs in somebody's terminal.
    """
    states = node_states(frozen)
    found = [name for name in frozen.nodes if name in names and states[name].state in WAITING]
    if not all(slurm.is_job(states[name].job) for name in found):
        raise LaunchError(f"{frozen.root}: runs in the terminal that started it; press Ctrl-C there")
    every = {name for name, state in states.items() if state.state in WAITING}
    if set(found) == every:  # whole arrays, in few words
        slurm.cancel(states[name].job.partition("_")[0] for name in found)
    else:
        slurm.cancel(states[name].job for name in found)
    records = read_records(frozen.root)
    for name in found:
        if states[name].state == "pending":  # of a task that never began, accounting may know nothing
            before = records.get(name)
            kept = before.requeues if before is not None else []
            write_record(frozen.root, name, Record("cancelled", states[name].job, requeues=kept))
    return found
