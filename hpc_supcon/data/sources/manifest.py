"""Images named in a table: a CSV, TSV or Parquet file with columns of paths, of labels and perhaps of splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...errors import DataError
from .file_sizes import file_sizes
from .folder import FolderSource, format_of
from .image_file import Exif
from .listing import Note
from .table_file import SUFFIXES, read_columns
from .tables import SPLIT_WORDS, Columns, arranged, numbered_labels, rows_named


@dataclass(frozen=True)
class _Table:
    """Rows of one split."""

    file: Path
    rows: list[int]
    """Of the file, from 0."""
    paths: list[str]
    labels: list[str | None]

    def where(self, indices: Sequence[int]) -> str:
        return f"{self.file}, {rows_named([self.rows[i] for i in indices])}"


def open_manifest(
    root: Path,
    *,
    columns: Columns,
    image_root: Path | None,
    image_size: int | None,
    channels: int | None,
    exif: Exif = "transpose",
    has_labels: bool = True,
    check_files: bool = True,
    note: Note | None = None,
) -> tuple[FolderSource, FolderSource | None, FolderSource | None]:
    """(train, validation or None, test or None; where one of these exists it is test) of the images of a table.

    root: one file whose column of splits says train, test and perhaps validation, or a folder with one file for each,
    called train.csv, test.csv ... (or .tsv, .parquet). Rows are counted from 1, after the header. columns: their
    names, see USUAL. image_root: where relative paths start; None: the folder of the file. has_labels: whether a
    column of labels is read; without, all may be of train. check_files: whether a file that is missing is named here,
    and not when it is read. Other arguments: see open_folder. Raises DataError.
    """
    tables = _tables(root, columns, has_labels=has_labels)
    if has_labels and len(tables) == 1:
        raise DataError(
            f"{root}: no test split: give a column of splits (data.columns.split) that says train, test and perhaps "
            "validation, or a folder with train.csv and test.csv"
        )
    paths = {
        split: [(image_root or table.file.parent) / path for path in table.paths] for split, table in tables.items()
    }
    if check_files:
        for split, table in tables.items():
            _check_files(table, paths[split])
    _note_repeated(root, paths, note)
    classes: tuple[str, ...] = ()
    labels = {split: torch.zeros(len(found), dtype=torch.int64) for split, found in paths.items()}
    if has_labels:
        values = {split: table.labels for split, table in tables.items()}
        classes, labels = numbered_labels(values, lambda split, rows: tables[split].where(rows), note)
    image_format = format_of(paths["train"], image_size, channels, exif)
    return arranged({split: FolderSource(paths[split], labels[split], classes, image_format) for split in tables})


def _tables(root: Path, columns: Columns, *, has_labels: bool) -> dict[str, _Table]:
    """Split -> its rows; train is one of them."""
    if root.is_file():
        found = _read_file(root, columns, has_labels=has_labels)
    elif not root.is_dir():
        raise DataError(f"manifest {root} does not exist: name a .csv, .tsv or .parquet, or a folder with train.csv")
    else:
        files: dict[str, Path] = {}
        for path in sorted(root.iterdir()):
            split = SPLIT_WORDS.get(path.stem.lower())
            if path.suffix.lower() not in SUFFIXES or split is None:
                continue
            if split in files:
                raise DataError(f"{files[split]} and {path.name} are both of {split}: remove one")
            files[split] = path
        found = {}
        for split, file in files.items():
            found[split] = _whole(file, columns, has_labels=has_labels)
    if "train" not in found:
        ends = ", ".join(SUFFIXES)
        raise DataError(
            f"{root}: no rows of train: expected a file of that name ({ends}) or a column of splits that says train"
        )
    return found


def _whole(file: Path, columns: Columns, *, has_labels: bool) -> _Table:
    """All rows of a file, whatever splits it names."""
    found = read_columns(file, columns, {"image": True, "label": has_labels})
    paths = found["image"]
    return _Table(file, list(range(len(paths))), _checked_paths(file, paths), found.get("label", [None] * len(paths)))


def _read_file(file: Path, columns: Columns, *, has_labels: bool) -> dict[str, _Table]:
    """The rows of a file by split; all are of train where no column names one."""
    found = read_columns(file, columns, {"image": True, "label": has_labels, "split": columns.split is not None})
    paths = _checked_paths(file, found["image"])
    labels = found.get("label", [None] * len(paths))
    names = [SPLIT_WORDS.get((text or "").strip().lower()) for text in found.get("split", ["train"] * len(paths))]
    if unknown := [i for i, name in enumerate(names) if name is None]:
        text = found["split"][unknown[0]]
        raise DataError(
            f"{file}, {rows_named(unknown)}: the split is {text or ''!r}; expected train, validation or test"
        )
    tables: dict[str, _Table] = {}
    for i, name in enumerate(names):
        assert name is not None
        table = tables.setdefault(name, _Table(file, [], [], []))
        table.rows.append(i)
        table.paths.append(paths[i])
        table.labels.append(labels[i])
    return tables


def _checked_paths(file: Path, paths: list[str | None]) -> list[str]:
    if not paths:
        raise DataError(f"{file}: it has no rows")
    if empty := [i for i, path in enumerate(paths) if not path]:
        raise DataError(f"{file}, {rows_named(empty)}: the path of the image is empty")
    return [path for path in paths if path]


def _check_files(table: _Table, paths: Sequence[Path]) -> None:
    missing = np.flatnonzero(file_sizes(paths) < 0).tolist()
    if missing:
        raise DataError(
            f"{table.where(missing)}: {paths[missing[0]]} does not exist, or is no file; relative paths start at "
            "data.image_root, or else at the folder of the manifest"
        )


def _note_repeated(root: Path, paths: dict[str, list[Path]], note: Note | None) -> None:
    counts = Counter(path for found in paths.values() for path in found)
    repeated = sum(1 for count in counts.values() if count > 1)
    if repeated and note is not None:
        note(f"{root}: {repeated:,} images are named more than once, in one split or in several")
