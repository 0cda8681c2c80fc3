"""A table of numbers for a reader: a plain list of rows that a notebook shows as a table."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

SHOWN = 20
"""Rows that are shown; of more, the first and the last ones."""


class Table(list[dict[str, Any]]):
    """Rows as dictionaries: a list like any other, which a notebook shows as a table.

    `pandas.DataFrame(table)` and `table.to_arrow()` make data frames of it. A row has the keys that its event has;
    losses have no unit, accuracies are fractions, times are seconds, rates images per second.

    Args:
        rows: the rows, name -> value; a value may be a number, a text, a list or a mapping.

    Raises:
        KeyError: from `column` for a name that no row has.

    Source:
        metrics.jsonl and results.json of a run folder.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__(dict(row) for row in rows)

    @property
    def columns(self) -> list[str]:
        """The names of all rows, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self for name in row))

    def column(self, name: str) -> list[Any]:
        """The values of one name, of the rows that have it. Raises KeyError where none has."""
        if name not in self.columns:
            raise KeyError(f"no column {name!r}; there are {', '.join(self.columns) or 'none'}")
        return [row[name] for row in self if name in row]

    def where(self, **equal: Any) -> Table:
        """The rows whose values are these, such as `where(event="train")`."""
        return Table(row for row in self if all(row.get(name) == value for name, value in equal.items()))

    def to_arrow(self) -> pyarrow.Table:
        """The same as a pyarrow.Table; missing values are null, mappings become columns `name.key`."""
        import pyarrow

        flat = [dict(_flat(row)) for row in self]
        names = dict.fromkeys(name for row in flat for name in row)
        return pyarrow.table({name: [row.get(name) for row in flat] for name in names})

    def __repr__(self) -> str:
        return f"Table of {len(self)} rows: {', '.join(self.columns)}"

    def _repr_html_(self) -> str:
        rows = [dict(_flat(row)) for row in self]
        names = list(dict.fromkeys(name for row in rows for name in row))
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        if len(rows) > SHOWN:
            rows = [*rows[: SHOWN // 2], dict.fromkeys(names, "..."), *rows[-SHOWN // 2 :]]
        body = "".join(f"<tr>{''.join(f'<td>{_shown(row.get(name))}</td>' for name in names)}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{len(self)} rows</p>"


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return html.escape(text if len(text) <= 80 else f"{text[:77]}...")
