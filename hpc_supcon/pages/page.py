"""The page: one HTML file that needs no other file and makes no request.

Everything of a user's in it is text: Jinja2 escapes it, and a policy of the page lets a browser run only the script
and the styles of this package.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..errors import OutputError, printable
from ..files import check_output, output_file
from .tables import Table

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = (
    "uPlot.iife.min.js",
    "core.js",
    "tables.js",
    "scatter.js",
    "map.js",
    "curves.js",
    "confusion.js",
    "start.js",
)
STYLES = ("uPlot.min.css", "page.css")
GENERATOR = "hpc-supcon"


@dataclass
class Section:
    """A part of the page. widget: what the script draws there; picture: a data URI with its description."""

    id: str
    title: str
    tables: list[Table] = field(default_factory=list)
    widget: str = ""
    note: str = ""
    picture: tuple[str, str] | None = None
    closed: bool = False
    """Its tables are shown on demand."""


@dataclass
class Headline:
    """A result of the first screen: `value` of `label`, with its interval, and where it lies in 0..1."""

    label: str
    value: str
    detail: str = ""
    fraction: float | None = None
    interval: tuple[float, float] | None = None


@dataclass
class Page:
    """What is on a page. facts: of the first screen, (name, value); data: for the script, see assets/core.js."""

    title: str
    kind: str
    summary: str
    headlines: list[Headline]
    facts: list[tuple[str, str]]
    sections: list[Section]
    notices: list[str]
    data: dict[str, Any]
    has_map: bool = False


def render(page: Page, *, refresh_s: int | None = None) -> str:
    """The page as HTML. refresh_s: seconds after which a browser reads it again."""
    script, style = _asset(SCRIPTS), _asset(STYLES)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return _template().render(
        page=page,
        bars=_bars(page.headlines),
        notices=[printable(notice) for notice in page.notices],
        script=Markup(script),  # noqa: S704 - of this package
        style=Markup(style),  # noqa: S704 - of this package
        policy=policy,
        data=Markup(_inert_json(page.data)),  # noqa: S704 - without any character that HTML reads
        refresh_s=refresh_s,
        generator=f"{GENERATOR} {__version__}",
    )


def _bars(headlines: Sequence[Headline]) -> list[tuple[float, float, float] | None]:
    """(mean, low, high) of each headline on one scale of 0..200; None where there is nothing to compare."""
    intervals = [h.interval or (h.fraction, h.fraction) for h in headlines if h.fraction is not None]
    ends = [end for interval in intervals for end in interval if end is not None]
    if len(intervals) < 2 or min(ends) == max(ends):
        return [None] * len(headlines)
    low, width = min(ends), (max(ends) - min(ends)) / 0.9

    def place(value: float) -> float:
        return round(10 + 200 * (value - low) / width, 1)

    bars: list[tuple[float, float, float] | None] = []
    for h in headlines:
        at = h.interval or (h.fraction, h.fraction)
        known = h.fraction is not None and at[0] is not None and at[1] is not None
        bars.append((place(h.fraction), place(at[0]), place(at[1])) if known else None)  # type: ignore[arg-type]
    return bars


def check_page_output(path: Path) -> None:
    """Raise OutputError unless a page may be written there: in place of nothing, or of an older page."""
    check_output(path, force=_is_page(path))


def write_page(path: Path, html: str) -> None:
    """Write the page; a reader finds the old one or the new one. Raises OutputError."""
    with output_file(path, force=_is_page(path)) as partial:
        partial.write_bytes(html.encode("utf-8", "backslashreplace"))


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return f'name="generator" content="{GENERATOR} '.encode() in file.read(500)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return True  # check_output says more
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}") from None


def _inert_json(data: Any) -> str:
    """JSON of ASCII letters, without the characters by which HTML ends a script."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _asset(names: Sequence[str]) -> str:
    return "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in names)


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html")
