"""Wrong settings in one line: who gave the setting, what is wrong with it, what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from .. import parts
from ..errors import unknown_name
from .code import SETTINGS
from .schema import Config
from .schema.base import settings_of

_SETTING = re.compile(r"[a-z]\w*(?:\.\w+)+")


def explain(error: ValidationError, origins: Mapping[str, str], where: str) -> str:
    """The first problem that the schema found. `origins`: setting -> who gave it; `where`: who gave the others."""
    fields = dict(settings_of(Config))
    key, first = _first(error, fields)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # a rule of the schema, which names its settings itself
        return name_origin(message, origins, where)
    names = set(_names(fields[key].annotation)) if key in fields else set()
    if key in SETTINGS:
        names |= set(parts.registered(SETTINGS[key]))
    if first["type"] == "literal_error" and isinstance(first["input"], str) and names:
        return f"{origins.get(key, where)}: {unknown_name(key, first['input'], names)}"
    given = "" if first["type"] == "missing" else f", not {first['input']!r}"
    return f"{origins.get(key, where)}: {key}: {message[:1].lower() + message[1:]}{given}"


def name_origin(message: str, origins: Mapping[str, str], where: str) -> str:
    """`message`, about one or more settings that it names, after those who gave these settings."""
    givers = dict.fromkeys(origins[key] for key in _SETTING.findall(message) if key in origins)
    return f"{' and '.join(givers) or where}: {message}"


def unknown_key(path: str, siblings: Iterable[str], prefix: str) -> str:
    """The message for a setting that does not exist, with the nearest one that does."""
    every = [key for key, _ in settings_of(Config)]
    near = difflib.get_close_matches(path, [f"{prefix}{k}" for k in siblings], n=1)
    # the right name in the wrong section: batch_size -> data.batch_size
    near = near or [k for k in every if k.endswith(f".{path.rpartition('.')[2]}")]
    near = near or difflib.get_close_matches(path, every, n=1)
    return f"unknown key {path!r}" + (
        f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(siblings)}"
    )


def _first(error: ValidationError, fields: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(setting, its error) of the first setting that has one.

    A union reports an error for each of its members: the one that goes deepest into the value is meant.
    """
    found = [(_setting(details["loc"], fields), details) for details in error.errors(include_url=False)]
    own = [details for key, details in found if key == found[0][0]]
    return found[0][0], max(own, key=lambda details: len(details["loc"]))


def _setting(location: tuple[int | str, ...], fields: Mapping[str, Any]) -> str:
    """The longest beginning of pydantic's path that is a setting; the path itself where none is."""
    parts = [str(part) for part in location]
    paths = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((path for path in paths if path in fields), ".".join(parts))


def _names(annotation: Any) -> Iterator[str]:
    """The texts of every Literal in a type."""
    if get_origin(annotation) is Literal:
        yield from (name for name in get_args(annotation) if isinstance(name, str))
    else:
        for argument in get_args(annotation):
            yield from _names(argument)
