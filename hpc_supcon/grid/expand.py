"""From a grid file to the graph of its runs. Reads recipes, but writes and submits nothing.

Every cell is validated. Cells whose pre-training computes the same share one node for it:

    pretrain -> probe (one for each setting of section `probe`)
             -> prune (one for each setting of section `prune`, evaluated again)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..config import Stage, check_config
from ..config.code import import_paths
from ..errors import ConfigError
from .cells import Choice, Option, UniqueNames, choices, matches
from .resolver import Change, Resolved, Resolver, override_change
from .schema import STAGES, GridConfig, Resources, ResourcesConfig, TableConfig, with_changes

NO_PRUNING = Change("prune.rate", "null", "")


@dataclass(frozen=True)
class Node:
    """One stage of one or more cells. `folder`: name of its run folder; `parent`: the node it depends on;
    `identity`: what it computes, equal for equal computations."""

    name: str
    stage: str
    folder: str
    parent: str | None
    resources: Resources
    identity: str
    resolved: Resolved = field(repr=False, compare=False)


@dataclass(frozen=True)
class Cell:
    """One combination of the axes: axis -> label, the seed, and its nodes in the order in which they run."""

    name: str
    labels: dict[str, str]
    seed: int
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class GridPlan:
    """The whole grid. A node comes after the one it depends on."""

    name: str
    cells: tuple[Cell, ...]
    nodes: dict[str, Node]
    tables: tuple[TableConfig, ...]
    pack: int

    @cached_property
    def code(self) -> tuple[str, ...]:
        """The import paths in the configurations, which the grid file, recipes or overrides have given."""
        parts = {id(part): part for node in self.nodes.values() for part in node.resolved.parts.values()}
        return tuple(sorted({name for part in parts.values() for name in import_paths({part.name: part.data})}))

    @cached_property
    def hours(self) -> tuple[float, float, float]:
        """(GPU-hours, CPU-core-hours, hours of the longest path) if every job runs until its time limit."""
        gpu = cpu = longest = 0.0
        ends: dict[str, float] = {}
        packs: dict[str, int] = {}
        for node in self.nodes.values():
            r, hours = node.resources, node.resources.minutes / 60
            packs[node.stage] = packs.get(node.stage, 0) + 1
            ends[node.name] = hours + (ends[node.parent] if node.parent else 0.0)
            longest = max(longest, ends[node.name])
            if packs[node.stage] % self.pack == 1 or self.pack == 1:
                gpu += r.nodes * r.gpus * hours
                cpu += r.nodes * r.tasks_per_node * r.cpus * hours
        return gpu, cpu, longest


def expand(grids: Sequence[GridConfig], overrides: Sequence[str] = ()) -> GridPlan:
    """The graph of the first grid and of those it includes. `overrides` (key.sub=value) apply to every cell.

    Raises ConfigError: for an unknown field or a wrong value in any cell, for settings that contradict each other or
    the number of ranks, for an empty grid, and for two cells that would compute the same.
    """
    builder = _Builder(overrides)
    for grid in grids:
        for chosen in choices(grid):
            builder.add(grid, chosen)
    outer = grids[0]
    if not builder.cells:
        raise ConfigError(f"grid {outer.name!r}: has no cells (everything is excluded)")
    if outer.pack > 1:
        wide = next((n for n in builder.nodes.values() if n.resources.nodes * n.resources.tasks_per_node > 1), None)
        if wide is not None:
            raise ConfigError(
                f"grid {outer.name!r}: pack: {outer.pack} shares a job among runs of one rank, but {wide.name} has "
                f"{wide.resources.nodes} x {wide.resources.tasks_per_node}; set pack: 1"
            )
    tables = tuple(table for grid in grids for table in grid.tables) or _default_tables(outer)
    return GridPlan(outer.name, tuple(builder.cells), builder.nodes, tables, outer.pack)


class _Builder:
    """Collects cells and nodes, and detects those that compute the same."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self.cells: list[Cell] = []
        self.nodes: dict[str, Node] = {}
        self._overrides = [override_change(override) for override in overrides]
        self._names = UniqueNames()
        self._resolvers: dict[tuple[str, str], Resolver] = {}
        self._by_identity: dict[str, Node] = {}
        self._cell_by_identity: dict[str, str] = {}  # identity of the last node -> the cell's description

    def add(self, grid: GridConfig, chosen: Choice) -> None:
        shown = [option for option in chosen if _varies(grid, option)]
        description = " ".join(f"{option.axis}={option.label}" for option in shown) or grid.base
        where = f"grid {grid.name!r}: cell {description}"
        resolver, changes = self._resolver(grid, chosen), [change for option in chosen for change in option.changes]
        unpruned = resolver.resolve(tuple(c for c in changes if c.section != "prune"), where)
        resources = _resources(grid, chosen)
        nodes = self._pretrain_and_probe(unpruned, shown, resources, where)
        if any(change.section == "prune" for change in changes) and NO_PRUNING not in changes:
            pruned = resolver.resolve(tuple(changes), where)
            identity = f"prune {unpruned.digest} {pruned.after_training}"
            name = self._names.get([option.short for option in shown], identity)
            nodes.append(self._node(identity, "prune", name, nodes[0], resources.prune, pruned, where))
        last = nodes[-1]
        if last.identity in self._cell_by_identity:
            raise ConfigError(
                f"{where}: computes the same as cell {self._cell_by_identity[last.identity]}; leave one of them out"
            )
        self._cell_by_identity[last.identity] = description
        labels = {option.axis: option.label for option in chosen}
        self.cells.append(Cell(last.folder, labels, unpruned.seed, tuple(node.name for node in nodes)))

    def _pretrain_and_probe(
        self, resolved: Resolved, shown: list[Option], resources: ResourcesConfig, where: str
    ) -> list[Node]:
        trains = [option.short for option in shown if option.trains]
        probes = [option.short for option in shown if option.trains or option.touches("probe")]
        trained, probed = f"pretrain {resolved.digest}", f"probe {resolved.digest} {resolved.after_training}"
        first = trained not in self._by_identity
        name = self._by_identity[trained].folder if not first else self._names.get(trains, trained)
        parent = self._node(trained, "pretrain", name, None, resources.pretrain, resolved, where)
        if probed not in self._by_identity and not (first and trains == probes):
            name = self._names.get(probes, probed)  # another folder than that of the pre-training
        return [parent, self._node(probed, "probe", name, parent, resources.probe, resolved, where)]

    def _node(
        self,
        identity: str,
        stage: Stage,
        folder: str,
        parent: Node | None,
        resources: Resources,
        resolved: Resolved,
        where: str,
    ) -> Node:
        """The node that computes `identity`, which an earlier cell may have created. Raises ConfigError."""
        if identity not in self._by_identity:
            ranks = resources.nodes * resources.tasks_per_node
            try:
                check_config(resolved.config, stages=(stage,), world_size=ranks)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
            parent_name = parent.name if parent else None
            node = Node(f"{folder}.{stage}", stage, folder, parent_name, resources, identity, resolved)
            self._by_identity[identity] = self.nodes[node.name] = node
        return self._by_identity[identity]

    def _resolver(self, grid: GridConfig, chosen: Choice) -> Resolver:
        base = next((option.base for option in reversed(chosen) if option.base is not None), grid.base)
        for option in chosen:
            base = base.replace(f"{{{option.axis}}}", option.label)
        key = (grid.name, base)
        if key not in self._resolvers:
            fixed = [Change(path, json.dumps(v), f"grid {grid.name!r}: set") for path, v in grid.set.items()]
            self._resolvers[key] = Resolver(base, fixed, self._overrides)
        return self._resolvers[key]


def _varies(grid: GridConfig, option: Option) -> bool:
    """Whether an axis has several values, which names must then contain."""
    if option.axis == "seed":
        return grid.seeds != 1 and grid.seeds != (0,)
    return len(grid.axes.get(option.axis, ())) != 1


def _resources(grid: GridConfig, chosen: Choice) -> ResourcesConfig:
    """Resources of the stages of one cell: the grid's, changed by every rule that matches."""
    result = grid.resources
    for rule in grid.resources.where:
        if matches(rule.cells, chosen):
            where = f"grid {grid.name!r}: resources.where"
            stages = {stage: with_changes(getattr(result, stage), getattr(rule, stage), where) for stage in STAGES}
            result = result.model_copy(update=stages)
    return result


def _default_tables(grid: GridConfig) -> tuple[TableConfig, ...]:
    axes = [name for name, values in grid.axes.items() if len(values) > 1]
    rows = axes[0] if axes else "seed"
    pruning = next((axis for axis in axes if axis == "prune.rate"), None)
    tables = [TableConfig(title="scores", layout="scores", rows=rows, columns=axes[1] if len(axes) > 1 else None)]
    if pruning is not None:
        tables.append(TableConfig(title="pruning", layout="pruning", rows=pruning))
    return tuple(tables)
