"""Names of cells that are readable, safe as folder names, and different."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

LONGEST = 80


def label_of(value: Any) -> str:
    """How a value is shown in tables."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(label_of(v) for v in value)
    return json.dumps(value)


def slug(text: str) -> str:
    """Letters, digits and `.+-` only: no blanks, quotes, slashes or newlines; never empty or hidden."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.") or "x"


def short(field: str, value: Any) -> str:
    """A field's value in a name: text stands for itself, a number needs to say of what."""
    return (
        slug(label_of(value))
        if isinstance(value, str)
        else f"{slug(field.rpartition('.')[2])}-{slug(label_of(value))}"
    )


class Names:
    """Hands out names: the same for the same `identity`, different ones for different identities."""

    def __init__(self) -> None:
        self._owner: dict[str, str] = {}

    def give(self, parts: list[str], identity: str) -> str:
        """`parts` joined; shortened, or told apart, by a hash of `identity` where that is needed."""
        name, tag = "_".join(parts) or "cell", hashlib.sha256(identity.encode()).hexdigest()[:8]
        if len(name) > LONGEST:
            name = f"{name[: LONGEST - 9]}_{tag}"
        if self._owner.setdefault(name, identity) != identity:
            name = f"{name[: LONGEST - 9]}_{tag}"
            self._owner[name] = identity
        return name
