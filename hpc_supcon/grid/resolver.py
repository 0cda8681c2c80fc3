"""Configurations of many cells that differ in few sections: each section is merged, dumped and hashed once."""

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
from ..config.schema import Config

AFTER_TRAINING = ("probe", "prune")
"""Sections that change nothing in pre-training: cells that differ in them alone share one."""


@dataclass(frozen=True)
class Change:
    """One setting of a cell: `path` (dotted) gets the value in `json`; `where` says in errors who wanted that."""

    path: str
    json: str
    where: str = field(compare=False)

    @property
    def section(self) -> str:
        return self.path.partition(".")[0]


@dataclass(eq=False)
class Piece:
    """One top-level key of the configuration: as written in `json`, and, once validated, as it is meant."""

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
    def counted(self) -> str:
        """Those of them that change what pre-training computes."""
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
    """A whole validated configuration: `pieces` by top-level key."""

    pieces: dict[str, Piece]

    @property
    def seed(self) -> int:
        return int(self.pieces["seed"].value)

    @cached_property
    def config(self) -> Config:
        return Config.model_construct(**{name: piece.value for name, piece in self.pieces.items()})

    @cached_property
    def digest(self) -> str:
        """Equal to config.digest, put together from the pieces."""
        counted = (self.pieces[name].counted for name in sorted(self.pieces))
        members = ", ".join(text for text in counted if text)
        return hashlib.sha256(f"{{{members}}}".encode()).hexdigest()

    @cached_property
    def after_training(self) -> str:
        """What the stages after pre-training do, as text that is equal when they do the same."""
        return ", ".join(self.pieces[name].members for name in AFTER_TRAINING if name in self.pieces)

    def yaml(self, **replaced: str) -> str:
        """The configuration as YAML, with some top-level keys replaced."""
        return "".join(
            f"{name}: {json.dumps(replaced[name])}\n" if name in replaced else piece.yaml
            for name, piece in self.pieces.items()
        )


class Resolver:
    """Cells over one base recipe."""

    def __init__(self, base: str, fixed: Sequence[Change], last: Sequence[Change]) -> None:
        """`fixed` changes the recipe for every cell, `last` every cell after its own. Raises ConfigError."""
        self._last = tuple(last)
        self._data, self._origins = resolve(base)
        for change in fixed:
            merge(self._data, _nested(change), change.where, self._origins)
        self._pieces: dict[tuple[str, tuple[Change, ...]], Piece] = {}
        self._unchanged = {name: self._piece(name, ()) for name in self._data}

    def resolve(self, changes: tuple[Change, ...], where: str) -> Resolved:
        """The base with `changes`, later ones over earlier ones. Raises ConfigError."""
        by_section: dict[str, tuple[Change, ...]] = {}
        for change in (*changes, *self._last):
            by_section[change.section] = (*by_section.get(change.section, ()), change)
        for name, own in by_section.items():
            if name not in self._data:
                merge(copy.deepcopy(self._data), _nested(own[0]), own[0].where, {})  # raises, and says what is near
        pieces = {**self._unchanged, **{name: self._piece(name, own) for name, own in by_section.items()}}
        if all(piece.validated for piece in pieces.values()):  # the schema has no rule over several of them
            return Resolved(pieces)
        text = ", ".join(f'"{name}": {piece.json}' for name, piece in pieces.items())
        origins = {key: who for piece in pieces.values() for key, who in piece.origins.items()}
        config = validated(f"{{{text}}}", origins, where)
        for name, piece in pieces.items():
            piece.value, piece.validated = getattr(config, name), True
        return Resolved(pieces)

    def _piece(self, name: str, changes: tuple[Change, ...]) -> Piece:
        key = (name, changes)
        if key not in self._pieces:
            data = {name: copy.deepcopy(self._data[name])}
            origins = {k: v for k, v in self._origins.items() if k.partition(".")[0] == name}
            for change in changes:
                merge(data, _nested(change), change.where, origins)
            self._pieces[key] = Piece(name, json.dumps(data[name]), origins)
        return self._pieces[key]


def override_change(override: str) -> Change:
    """`key.sub=value` of the command line as a change. Raises ConfigError."""
    path, value = override.partition("=")[0], parse_override(override)
    for part in path.split("."):
        value = value[part]
    return Change(path, json.dumps(value), f"override {override!r}")


def _nested(change: Change) -> dict[str, Any]:
    value = json.loads(change.json)
    for part in reversed(change.path.split(".")):
        value = {part: value}
    return dict(value)
