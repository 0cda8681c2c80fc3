"""What a Jupyter notebook shows in place of a terminal: a progress bar that is updated in place, and pictures.

IPython is never imported here: a notebook has done so.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which shows HTML and pictures."""
    ipython = sys.modules.get("IPython")
    shell: Any = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class NotebookBar:
    """A progress bar in the output of a cell."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._handle: Any = None

    def update(self, done: int, text: str) -> None:
        """Show that `done` of the total are done, and a line of text beside it."""
        shown = _Html(
            f"<div style='font-family: monospace'>{html.escape(self._name)} "
            f"<progress value='{done}' max='{self._total}'></progress> {done}/{self._total} "
            f"{html.escape(text)}</div>",
            f"{self._name} {done}/{self._total} {text}",
        )
        if self._handle is None:
            self._handle = _display(shown, display_id=True)
        else:
            self._handle.update(shown)


class _Html:
    """HTML, and the same as text for what shows none."""

    def __init__(self, content: str, text: str) -> None:
        self._content, self._text = content, text

    def _repr_html_(self) -> str:
        return self._content

    def __repr__(self) -> str:
        return self._text


class _Picture:
    """A PNG file in the output of a cell."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _repr_png_(self) -> bytes:
        return self._path.read_bytes()

    def __repr__(self) -> str:
        return str(self._path)


def show_pictures(paths: Sequence[Path]) -> None:
    """Show PNG files in the output of the cell. Raises OSError."""
    for path in paths:
        _display(_Picture(path))


def _display(shown: Any, **options: Any) -> Any:
    return sys.modules["IPython"].display.display(shown, **options)
