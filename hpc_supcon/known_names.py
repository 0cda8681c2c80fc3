"""The names of a user's own parts that this process knows: those that may be imported, those that stand for an object
of the caller's, and those that may be read but not imported. parts.py resolves them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import CodeNotAllowed

Key = tuple[str, str]
"""Kind and name of a part."""
ARGUMENTS = {"sources": "source", "encoders": "encoder", "losses": "loss"}
"""Kind -> the argument by which a caller gives an object of that kind."""

allowed: set[str] = set()
"""Import paths that the user has given."""
objects: dict[Key, Any] = {}
"""Parts that are objects of the caller's, in place of what their names would be imported as."""
named: set[str] = set()
"""Import paths that a folder holds, and that may be read there."""


@contextmanager
def given(own: Mapping[Key, Any], only_read: Iterable[str] = ()) -> Iterator[None]:
    """Inside, the names of `own` stand for its parts, and the import paths `only_read` may stand in what is read.
    Afterwards none of them may be imported that could not before."""
    before = dict(objects), set(named)
    not_allowed = {name for _, name in own} - allowed
    objects.update(own)
    named.update(only_read)
    try:
        yield
    finally:
        objects.clear()
        objects.update(before[0])
        named.clear()
        named.update(before[1])
        allowed.difference_update(not_allowed)


def check_given(kind: str, name: str, setting: str) -> None:
    """Raise CodeNotAllowed for a name that may only be read."""
    if name in named and name not in allowed:
        again = f"give the object again, hs.load(RUN_DIR, {ARGUMENTS[kind]}=...), or " if kind in ARGUMENTS else ""
        raise CodeNotAllowed(
            f"{setting}={name}: is not of this package, and nothing was imported: {again}let it be imported, "
            f"hs.load(RUN_DIR, allow_code=[{name!r}])"
        )


def known() -> set[str]:
    """All names that may stand in what is read."""
    return allowed | named | {name for _, name in objects}
