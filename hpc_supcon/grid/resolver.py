"""The configurations of many cells that differ in few sections: each section is merged, dumped and hashed once."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import BaseModel

from ..config import flatten_data, is_neutral, merge, parse_override, resolve, validated, yaml12
from ..config.code import given
from ..config.schema import Config

AFTER_TRAINING = ("probe", "prune")
"""Sections that do not change pre-training: cells that differ only in them share one."""


@dataclass(frozen=True)
class Change:
    """One setting of a cell: dotted `path`, its value as JSON, and for errors `where` it was set."""

    path: str
    json: str
    where: str = field(compare=False)

    @property
    def section(self) -> str:
        return self.path.partition(".")[0]


@dataclass(eq=False)
class ConfigPart:
    """One top-level key of a configuration: its `json` as written, and its `value` after validation."""

    name: str
    json: str
    origins: dict[str, str]
    value: Any = None
    validated: bool = False

    @cached_property
    def members(self) -> str:
        """Its settings as JSON members, sorted: `"loss.k1": 5000.0, "loss.k2": 1.0`."""
        return ", ".join(text for _, text in self._members)

    @cached_property
    def trained_members(self) -> str:
        """Those of `members` that change what pre-training computes."""
        return ", ".join(text for key, text in self._members if not is_neutral(key))

    @cached_property
    def _members(self) -> list[tuple[str, str]]:
        flat = flatten_data({self.name: self.data})
        return [(key, f"{json.dumps(key)}: {json.dumps(flat[key])}") for key in sorted(flat)]

    @property
    def data(self) -> Any:
        return self.value.model_dump(mode="json") if isinstance(self.value, BaseModel) else self.value

    @cached_property
    def yaml(self) -> str:
        data = self.data
        return yaml12.dumps({self.name: data}) if isinstance(data, dict) else f"{self.name}: {json.dumps(data)}\n"


@dataclass(frozen=True)
class Resolved:
    """A whole validated configuration: its parts by top-level key."""

    parts: dict[str, ConfigPart]

    @property
    def seed(self) -> int:
        return int(self.parts["seed"].value)

    @cached_property
    def config(self) -> Config:
        return Config.model_construct(**{name: part.value for name, part in self.parts.items()})

    @cached_property
    def digest(self) -> str:
        """Equal to config.digest of the whole configuration."""
        trained = (self.parts[name].trained_members for name in sorted(self.parts))
        members = ", ".join(text for text in trained if text)
        return hashlib.sha256(f"{{{members}}}".encode()).hexdigest()

    @cached_property
    def after_training(self) -> str:
        """The settings of the stages after pre-training, as text: equal if these stages compute the same."""
        return ", ".join(self.parts[name].members for name in AFTER_TRAINING if name in self.parts)

    def yaml(self, **replaced: str) -> str:
        """The configuration as YAML, with some top-level keys replaced."""
        return "".join(
            f"{name}: {json.dumps(replaced[name])}\n" if name in replaced else part.yaml
            for name, part in self.parts.items()
        )


class Resolver:
    """Resolves the cells of one base recipe."""

    def __init__(self, base: str, fixed: Sequence[Change], last: Sequence[Change]) -> None:
        """fixed: changes of every cell before its own; last: those after its own. Raises ConfigError."""
        self._last = tuple(last)
        self._data, self._origins = resolve(base)
        for change in fixed:
            merge(self._data, _nested(change), change.where, self._origins)
        self._parts: dict[tuple[str, tuple[Change, ...]], ConfigPart] = {}
        self._unchanged = {name: self._part(name, ()) for name in self._data}

    def resolve(self, changes: tuple[Change, ...], where: str) -> Resolved:
        """The base recipe with `changes`, of which later ones win. Raises ConfigError."""
        by_section: dict[str, tuple[Change, ...]] = {}
        for change in (*changes, *self._last):
            by_section[change.section] = (*by_section.get(change.section, ()), change)
        for name, own in by_section.items():
            if name not in self._data:
                merge(copy.deepcopy(self._data), _nested(own[0]), own[0].where, {})  # raises: unknown key
        parts = {**self._unchanged, **{name: self._part(name, own) for name, own in by_section.items()}}
        if all(part.validated for part in parts.values()):  # the schema has no rule over several of them
            return Resolved(parts)
        text = ", ".join(f'"{name}": {part.json}' for name, part in parts.items())
        origins = {key: origin for part in parts.values() for key, origin in part.origins.items()}
        config = validated(f"{{{text}}}", origins, where)
        for name, part in parts.items():
            part.value, part.validated = getattr(config, name), True
        return Resolved(parts)

    def _part(self, name: str, changes: tuple[Change, ...]) -> ConfigPart:
        key = (name, changes)
        if key not in self._parts:
            data = {name: copy.deepcopy(self._data[name])}
            origins = {k: v for k, v in self._origins.items() if k.partition(".")[0] == name}
            for change in changes:
                merge(data, _nested(change), change.where, origins)
            self._parts[key] = ConfigPart(name, json.dumps(data[name]), origins)
        return self._parts[key]


def override_change(override: str) -> Change:
    """An override of the command line, `key.sub=value`, as a change. Raises ConfigError."""
    path, value = override.partition("=")[0], parse_override(override)
    given(value, f"override {override!r}")
    for part in path.split("."):
        value = value[part]
    return Change(path, json.dumps(value), f"override {override!r}")


def _nested(change: Change) -> dict[str, Any]:
    value = json.loads(change.json)
    for part in reversed(change.path.split(".")):
        value = {part: value}
    return dict(value)
