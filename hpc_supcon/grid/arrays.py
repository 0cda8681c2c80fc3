"""Job arrays: which nodes become the tasks of one array. Those of equal resources whose children have equal ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .folder import FrozenGrid, FrozenNode
from .schema import Resources

JobNodes = tuple[FrozenNode, ...]
"""The nodes of one job: one, or several that are packed."""
Signature = tuple[object, ...]


@dataclass
class JobArray:
    """One job array. Job i depends on job i of `parent`, or all depend on `queued_parent`, the id of a queued job."""

    stage: str
    resources: Resources
    jobs: list[JobNodes]
    parent: JobArray | None = None
    queued_parent: str | None = None


def job_arguments(
    frozen: FrozenGrid, nodes: JobNodes
) -> tuple[str, str | list[str], str | list[str], tuple[str, ...]]:
    """Arguments of worker.run_nodes: stage, config path and run folder, or lists of paths if the job is packed; and
    the code that may be executed, which whoever submits has allowed."""
    configs, folders = [str(frozen.config(n)) for n in nodes], [str(frozen.run_folder(n)) for n in nodes]
    stage, code = nodes[0].stage, frozen.code
    return (stage, configs, folders, code) if len(nodes) > 1 else (stage, configs[0], folders[0], code)


def make_arrays(
    nodes: Sequence[FrozenNode], pack: int, max_length: int, queued: Mapping[str, str] | None = None
) -> list[JobArray]:
    """Arrays of at most `max_length` jobs of `pack` nodes that run every node once; parents come before children.

    queued: node -> job id of what is in the queue. A node whose parent is not in `nodes` depends on the parent's
    queued job, if there is one.
    """
    queued = queued or {}
    names = {node.name for node in nodes}
    children: dict[str, list[FrozenNode]] = {}
    for node in nodes:
        if node.parent in names:
            children.setdefault(str(node.parent), []).append(node)

    def signature(node: FrozenNode) -> Signature:
        below = sorted((signature(child) for child in children.get(node.name, ())), key=repr)
        return (node.stage, node.resources, *below)

    groups: dict[Signature, list[FrozenNode]] = {}
    for node in nodes:
        if node.parent not in names:
            groups.setdefault((queued.get(str(node.parent)), *signature(node)), []).append(node)
    arrays: list[JobArray] = []

    def add(jobs: list[JobNodes], parent: JobArray | None, queued_parent: str | None) -> None:
        first = jobs[0][0]
        array = JobArray(first.stage, first.resources, jobs, parent, queued_parent)
        arrays.append(array)
        below = [[sorted(children.get(n.name, ()), key=lambda c: repr(signature(c))) for n in job] for job in jobs]
        for i in range(len(below[0][0])):
            add([tuple(of_node[i] for of_node in job) for job in below], array, None)

    for key, group in groups.items():
        jobs = [tuple(group[i : i + pack]) for i in range(0, len(group), pack)]
        for i in range(0, len(jobs), max_length):
            add(jobs[i : i + max_length], None, str(key[0]) if key[0] is not None else None)
    return arrays
