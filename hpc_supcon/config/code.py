"""The settings that may name a part of a user's own (see parts.py), and who gave such a name.

A name that is an import path counts where the user gives it: in an override, a recipe or a grid file given by path,
or by `--allow-code`. The files of a run folder or of a grid folder are none of these, by whatever way they are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import parts
from ..errors import ConfigError
from . import yaml12

CONFIG, GRID = "config.yaml", "grid.json"
CODE = "code"
"""Key of grid.json: the import paths that the configurations of a grid hold."""
SETTINGS: dict[str, parts.Kind] = {
    "data.source": "sources",
    "model.encoder": "encoders",
    "loss.name": "losses",
    "loss.terms": "losses",
    "augment.policy": "policies",
    "probe.kind": "probes",
    "log.to": "loggers",
}
_MAY_HOLD_A_PATH = re.compile(rb":\S|\\")  # a backslash may stand for a colon


def import_paths(settings: Any, prefix: str = "") -> Iterator[str]:
    """The import paths in settings, nested or with dotted keys, at any depth of lists and mappings around them."""
    if isinstance(settings, list):
        for entry in settings:
            yield from import_paths(entry)
    if not isinstance(settings, Mapping):
        return
    for key, value in settings.items():
        path = f"{prefix}{key}"
        if path in SETTINGS:
            yield from (name for name in _texts(value) if parts.is_path(name))
        yield from import_paths(
            value, f"{path}." if path in ("data", "model", "loss", "augment", "probe", "log") else ""
        )


def _texts(value: Any) -> Iterator[str]:
    """The texts in the value of a setting: itself, those of a list, the keys of a mapping; of a grid's axis, in
    turn."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)):
        for entry in value:
            yield from _texts(entry)


def given(settings: Any, where: str, path: str | Path | None = None) -> None:
    """Allow the import paths in `settings`, which the user has given.

    path: of the file that they were read from, if any. Those of a folder's file are refused unless they are allowed
    already. Raises CodeNotAllowed; ConfigError for what is no import path.
    """
    names = list(import_paths(settings))
    if names and path is not None and belongs_to_folder(Path(path)):
        parts.check_allowed(names, where)
    else:
        parts.allow(names, where)


def belongs_to_folder(path: Path) -> bool:
    """Whether a YAML file is that of a run folder or of a grid folder, and not a recipe that somebody wrote."""
    return any(
        file.name == CONFIG or (file.parent / GRID).exists() or (file.parent.parent / GRID).exists()
        for file in (path.absolute(), path.resolve())
    )


def check_folder(folder: Path) -> None:
    """Raise CodeNotAllowed for a run folder or a grid folder that holds an import path which is not allowed.

    A file that cannot be read says so where it is used.
    """
    for path, found in paths_in(folder).items():
        parts.check_allowed(found, str(path))


def paths_in(folder: Path) -> dict[Path, list[str]]:
    """The import paths in each file of a run folder or a grid folder that can be read."""
    files: dict[Path, list[str]] = {}
    for name in (CONFIG, GRID):
        path = folder / name
        try:
            text = path.read_bytes()
            if name == GRID:
                files[path] = list(_texts(json.loads(text).get(CODE)))
            else:
                may = _MAY_HOLD_A_PATH.search(text)
                files[path] = list(import_paths(yaml12.loads(text.decode(), str(path)))) if may else []
        except (OSError, ValueError, AttributeError, RecursionError, ConfigError):
            continue
    return files
