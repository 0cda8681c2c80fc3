"""Which nodes go into one job array: those that need the same, and whose followers need the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .files import Resources
from .folder import Frozen, FrozenNode

Bundle = tuple[FrozenNode, ...]
"""The nodes of one job: one, or several that are packed."""
Signature = tuple[object, ...]


@dataclass
class Array:
    """One job array. Task i waits for task i of `after`, or for the job `live` that is in the queue already."""

    stage: str
    resources: Resources
    bundles: list[Bundle]
    after: Array | None = None
    live: str | None = None


def arguments_of(frozen: Frozen, bundle: Bundle) -> tuple[str | list[str], str | list[str]]:
    """(config path, run folder) of a job; lists of them where it is packed."""
    configs, folders = [str(frozen.config(n)) for n in bundle], [str(frozen.run_folder(n)) for n in bundle]
    return (configs, folders) if len(bundle) > 1 else (configs[0], folders[0])


def arrange(
    wanted: Sequence[FrozenNode], pack: int, longest: int, live: Mapping[str, str] | None = None
) -> list[Array]:
    """Arrays of at most `longest` jobs that run every node of `wanted` once, each array after the one it needs.

    A node whose parent is not in `wanted` waits for the parent's job in `live`, if it has one.
    """
    live = live or {}
    names = {node.name for node in wanted}
    children: dict[str, list[FrozenNode]] = {}
    for node in wanted:
        if node.parent in names:
            children.setdefault(str(node.parent), []).append(node)

    def signature(node: FrozenNode) -> Signature:
        below = sorted((signature(child) for child in children.get(node.name, ())), key=repr)
        return (node.stage, node.resources, *below)

    groups: dict[Signature, list[FrozenNode]] = {}
    for node in wanted:
        if node.parent not in names:
            groups.setdefault((live.get(str(node.parent)), *signature(node)), []).append(node)
    arrays: list[Array] = []

    def add(stage_bundles: list[Bundle], after: Array | None, waits_for: str | None) -> None:
        first = stage_bundles[0][0]
        array = Array(first.stage, first.resources, stage_bundles, after, waits_for)
        arrays.append(array)
        followers = [
            [sorted(children.get(n.name, ()), key=lambda c: repr(signature(c))) for n in b] for b in stage_bundles
        ]
        for i in range(len(followers[0][0])):
            add([tuple(below[i] for below in bundle) for bundle in followers], array, None)

    for key, nodes in groups.items():
        bundles = [tuple(nodes[i : i + pack]) for i in range(0, len(nodes), pack)]
        for i in range(0, len(bundles), longest):
            add(bundles[i : i + longest], None, str(key[0]) if key[0] is not None else None)
    return arrays
