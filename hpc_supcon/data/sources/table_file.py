"""Columns of a CSV, TSV or Parquet file as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import DataError, first_line
from .tables import Columns

SUFFIXES = (".csv", ".tsv", ".parquet")
USUAL = {
    "image": ("path", "file", "filename", "file_name", "image", "image_path", "filepath"),
    "label": ("label", "class", "target", "category"),
    "split": ("split",),
}
"""Names that a column of each kind may have where none is set, in any case; the first one that exists is taken."""


def read_columns(file: Path, columns: Columns, needed: dict[str, bool]) -> dict[str, list[str | None]]:
    """Kind of column -> its values as text, None where one is empty. needed: whether its lack is an error; columns
    that are not needed are left out where they are missing. Raises DataError."""
    import pyarrow as pa

    is_parquet = file.suffix.lower() == ".parquet"
    if file.suffix.lower() not in SUFFIXES:
        raise DataError(f"manifest {file} must end in {', '.join(SUFFIXES)}")
    try:
        names, types = _parquet_columns(file) if is_parquet else (_csv_columns(file), {})
        chosen = {}
        for kind, is_needed in needed.items():
            name = _chosen(file, kind, getattr(columns, kind), names)
            if name is not None:
                chosen[kind] = name
            elif is_needed:
                usual = ", ".join(USUAL[kind])
                raise DataError(
                    f"{file} has no column called {usual}, but {', '.join(names)}: set data.columns.{kind}"
                    f"{', or data.labels=none' if kind == 'label' else ''}"
                )
        _check_types(file, chosen, types)
        wanted = list(dict.fromkeys(chosen.values()))
        table = _read_parquet(file, wanted) if is_parquet else _read_csv(file, wanted)
        return {kind: table.column(name).cast(pa.string()).to_pylist() for kind, name in chosen.items()}
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"manifest {file} cannot be read: {first_line(error)}") from error


def _chosen(file: Path, kind: str, name: str | None, names: list[str]) -> str | None:
    if name is None:
        lower = {one.lower(): one for one in reversed(names)}
        return next((lower[usual] for usual in USUAL[kind] if usual in lower), None)
    if name not in names:
        raise DataError(f"{file} has no column {name!r} (data.columns.{kind}), but {', '.join(names)}")
    return name


def _check_types(file: Path, chosen: dict[str, str], types: dict[str, Any]) -> None:
    """Of a Parquet file. A label of a fraction is a mistake; an image that is no text lies in the file itself."""
    import pyarrow as pa

    for kind, name in chosen.items():
        found = types.get(name)
        found = found.value_type if found is not None and pa.types.is_dictionary(found) else found
        if found is None or pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_null(found):
            continue
        if kind == "image":
            raise DataError(
                f"{file}: column {name!r} has no paths but {found}: images within Parquet files are read by "
                "data.source=huggingface"
            )
        if not (pa.types.is_integer(found) or pa.types.is_boolean(found)):
            raise DataError(f"{file}: column {name!r} is of type {found}: expected text or integers")


def _csv_options(file: Path) -> Any:
    from pyarrow import csv

    return csv.ParseOptions(delimiter="\t" if file.suffix.lower() == ".tsv" else ",", newlines_in_values=True)


def _csv_columns(file: Path) -> list[str]:
    from pyarrow import csv

    with csv.open_csv(file, parse_options=_csv_options(file)) as reader:
        return list(reader.schema.names)


def _read_csv(file: Path, names: list[str]) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    options = csv.ConvertOptions(
        include_columns=names,
        column_types=dict.fromkeys(names, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
    )
    return csv.read_csv(file, parse_options=_csv_options(file), convert_options=options)


def _parquet_columns(file: Path) -> tuple[list[str], dict[str, Any]]:
    from pyarrow import parquet

    schema = parquet.read_schema(file)
    return list(schema.names), dict(zip(schema.names, schema.types, strict=True))


def _read_parquet(file: Path, names: list[str]) -> Any:
    from pyarrow import parquet

    return parquet.read_table(file, columns=names)
