"""The cells of a grid: the product of its axes without `exclude`, plus `include`; their settings and names."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.code import given
from ..errors import ConfigError, unknown_name
from .resolver import AFTER_TRAINING, Change
from .schema import GridConfig, Setting, read_grid

BASE = "base"


@dataclass(frozen=True)
class Option:
    """One value of an axis: its `label` in tables, its `short` form in names, and what it changes.

    base: the recipe that it chooses; trains: whether it can change the pre-training.
    """

    axis: str
    label: str
    short: str
    values: Mapping[str, Any]
    changes: tuple[Change, ...]
    base: str | None
    trains: bool

    @classmethod
    def of(cls, axis: str, label: str, short: str, values: Mapping[str, Any], where: str) -> Option:
        base = values.get(BASE)
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"{where}: base must be the name of a recipe, not {base!r}")
        changes = tuple(Change(key, json.dumps(value), where) for key, value in values.items() if key != BASE)
        # one without changes may choose the recipe by its label: base: "{axis}"
        trains = not changes or base is not None or any(change.section not in AFTER_TRAINING for change in changes)
        return cls(axis, label, short, values, changes, base, trains)

    def touches(self, section: str) -> bool:
        return any(change.section == section for change in self.changes)


Choice = tuple[Option, ...]


def load(path: Path, _chain: tuple[Path, ...] = ()) -> list[GridConfig]:
    """The grid file and those that it includes. Raises ConfigError, also for a cyclic include."""
    resolved = path.resolve()
    if resolved in _chain:
        names = " -> ".join(p.name for p in (*_chain[_chain.index(resolved) :], resolved))
        raise ConfigError(f"{path}: includes itself: {names}")
    grid = read_grid(path)
    given(grid.model_dump(mode="json"), str(path), path)
    included = [path.parent / entry for entry in grid.include if isinstance(entry, str)]
    return [grid, *(g for other in included for g in load(other, (*_chain, resolved)))]


def choices(grid: GridConfig) -> Iterator[Choice]:
    """Every cell of one grid, without those of included files, as one option of each axis; the seed is the last."""
    axes = [_options(name, values, grid.name) for name, values in grid.axes.items()]
    for rule in (*grid.exclude, *(rule.cells for rule in grid.resources.where)):
        _check_keys(rule, axes, grid.name)
    seeds = _seeds(grid)
    extra = [_included(entry, axes, grid.name) for entry in grid.include if isinstance(entry, dict)]
    own: Iterator[Choice] = itertools.product(*axes) if axes or not grid.include else iter(())
    for chosen in itertools.chain(own, extra):
        if not any(matches(rule, chosen) for rule in grid.exclude):
            for seed in seeds:
                yield (*chosen, seed)


def matches(rule: Setting, chosen: Choice) -> bool:
    """Whether all of a rule is true of a cell: `axis: value`, or a list of values, or a field that an axis sets."""
    return all(any(_has_value(option, key, want) for option in chosen) for key, want in rule.items())


def _has_value(option: Option, key: str, want: Any) -> bool:
    def same(wanted: Any) -> bool:
        if option.axis == key and label_of(wanted) == option.label:
            return True
        return key in option.values and label_of(option.values[key]) == label_of(wanted)

    return same(want) or (isinstance(want, list) and any(same(w) for w in want))


def _check_keys(rule: Setting, axes: list[list[Option]], name: str) -> None:
    known = {"seed"} | {key for axis in axes for option in axis for key in (option.axis, *option.values)}
    for key, want in rule.items():
        if key not in known:
            raise ConfigError(f"grid {name!r}: {unknown_name('axis', key, known)}")
        wanted = [want, *want] if isinstance(want, list) else [want]
        if key != "seed" and not any(_has_value(option, key, w) for axis in axes for option in axis for w in wanted):
            raise ConfigError(f"grid {name!r}: {key} is never {label_of(want)!r}, so this rule matches no cell")


def _options(axis: str, values: list[Any] | dict[str, Setting], name: str) -> list[Option]:
    where = f"grid {name!r}: axis {axis!r}"
    if not values:
        raise ConfigError(f"{where}: has no values")
    if isinstance(values, dict):
        options = [
            Option.of(axis, label, slug(label), changes, f"{where}, {label!r}") for label, changes in values.items()
        ]
    else:
        options = [
            Option.of(axis, label_of(v), short(axis, v), {axis: v}, f"{where}, value {label_of(v)!r}") for v in values
        ]
    labels = [option.label for option in options]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}: the value {twice!r} is given twice")
    return options


def _seeds(grid: GridConfig) -> list[Option]:
    if "seed" in grid.axes:
        raise ConfigError(f"grid {grid.name!r}: give seeds as `seeds: [0, 1]`, not as an axis")
    seeds = range(grid.seeds) if isinstance(grid.seeds, int) else grid.seeds
    if not seeds:
        raise ConfigError(f"grid {grid.name!r}: seeds is empty")
    return [Option.of("seed", str(s), f"s{s}", {"seed": s}, f"grid {grid.name!r}: seeds") for s in seeds]


def _included(entry: Setting, axes: list[list[Option]], name: str) -> Choice:
    """The options of one entry of `include`: labels of axes, or fields with their values."""
    chosen = []
    for key, value in entry.items():
        where = f"grid {name!r}: include {key!r}"
        known = next((o for axis in axes for o in axis if o.axis == key and o.label == label_of(value)), None)
        named = any(option.axis == key and key not in option.values for axis in axes for option in axis)
        if known is None and named:
            labels = [option.label for axis in axes for option in axis if option.axis == key]
            raise ConfigError(f"{where}: {unknown_name('label', label_of(value), labels)}")
        chosen.append(known or Option.of(key, label_of(value), short(key, value), {key: value}, where))
    return tuple(chosen)


MAX_NAME_LENGTH = 80


def label_of(value: Any) -> str:
    """A value as text for tables."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(label_of(v) for v in value)
    return json.dumps(value)


def slug(text: str) -> str:
    """Letters, digits and `.+-` only, without blanks, quotes, slashes or newlines; never empty or a hidden file."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.") or "x"


def short(field: str, value: Any) -> str:
    """A field's value in a name: text as it is, other values with the name of the field."""
    return (
        slug(label_of(value))
        if isinstance(value, str)
        else f"{slug(field.rpartition('.')[2])}-{slug(label_of(value))}"
    )


class UniqueNames:
    """Names of run folders: the same for the same identity, different ones for different identities."""

    def __init__(self) -> None:
        self._owner: dict[str, str] = {}

    def get(self, parts: list[str], identity: str) -> str:
        """`parts` joined by "_". If that is too long, or the name of another identity, a hash is appended."""
        name, digest = "_".join(parts) or "cell", hashlib.sha256(identity.encode()).hexdigest()[:8]
        if len(name) > MAX_NAME_LENGTH:
            name = f"{name[: MAX_NAME_LENGTH - 9]}_{digest}"
        if self._owner.setdefault(name, identity) != identity:
            name = f"{name[: MAX_NAME_LENGTH - 9]}_{digest}"
            self._owner[name] = identity
        return name
