"""What installed packages register by entry points."""

from __future__ import annotations

import sys
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any


def installed_entry_points(prefix: str) -> dict[str, dict[str, list[EntryPoint]]]:
    """Rest of the group's name -> name -> its entry points, of every group that begins with `prefix`.

    Those of installed packages: what lies in the current directory is not installed, although Python may have it in
    its path. Imports nothing.
    """
    here = Path.cwd().resolve()
    path = [folder for folder in sys.path if folder and Path(folder).resolve() != here]
    found: dict[str, dict[str, list[EntryPoint]]] = {}
    seen: set[str] = set()
    for package in metadata.distributions(path=path):
        own = [entry for entry in package.entry_points if entry.group.startswith(prefix)]
        if not own or package.metadata["Name"] in seen:
            continue  # of two installations of a package, Python imports the first
        seen.add(package.metadata["Name"])
        for entry in own:
            found.setdefault(entry.group.removeprefix(prefix), {}).setdefault(entry.name, []).append(entry)
    return found


def package_of(entry: EntryPoint) -> str:
    """The package that registers it, for messages."""
    package: Any = getattr(entry, "dist", None)  # Python 3.10 knows it of some
    return f"the package {package.metadata['Name']}" if package is not None else f"the module {entry.value}"
