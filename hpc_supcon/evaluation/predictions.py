"""RUN_DIR/predictions.parquet: the probabilities that each probe gives each image of validation and test.

Columns: probe, split, index (int64, of the image in the split), path (relative to the data's root; null for data
without files), label and prediction (int32, positions in the probe's classes, whose names are in scores.json),
probabilities (list of float32). Train is not in it: its rows would be most of the file, and tell little of a
classifier that was fitted on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..distributed.collectives import gather_rows_of
from ..errors import MissingExtra, RunFolderError
from ..files import atomic_path, file_lock
from .scores import Outcomes

if TYPE_CHECKING:
    import pyarrow as pa

PREDICTIONS = "predictions.parquet"
SPLITS = ("validation", "test")
_NUMBERS = 2**22
"""Probabilities in one row group, which is what is in memory when the file is rewritten."""


@dataclass(frozen=True)
class SplitPredictions:
    """What a probe predicts for the images of all ranks, in the order of the split."""

    outcomes: Outcomes
    index: npt.NDArray[np.int64]
    """[n]: which images of the split these are."""
    probabilities: npt.NDArray[np.float32]
    """[n, C]."""


def gather_predictions(outcomes: Outcomes, logits: Tensor, index: Tensor) -> SplitPredictions:
    """The predictions of all ranks, from this rank's logits float [n_r, C] and index int64 [n_r]. Collective.

    outcomes: of the same samples.
    """
    # in chunks: float64 copies of everything would be large
    probabilities = torch.cat([rows.double().softmax(dim=1).float() for rows in logits.split(8192)])
    found, probabilities = gather_rows_of([index, probabilities])
    return SplitPredictions(outcomes, found.cpu().numpy(), probabilities.cpu().numpy())


def check_predictions(folder: Path) -> None:
    """Raise RunFolderError for a file to which nothing can be added, MissingExtra without pyarrow.

    Call it before the work.
    """
    parquet = _pyarrow_parquet()
    if (folder / PREDICTIONS).exists():
        with _named(folder / PREDICTIONS):
            _check_schema(parquet.ParquetFile(folder / PREDICTIONS))


def write_predictions(
    folder: Path,
    probe: str,
    splits: dict[str, SplitPredictions],
    *,
    paths: dict[str, Sequence[Path] | None],
    root: Path | None,
) -> None:
    """Write the rows of one probe, in place of earlier ones of it; those of other probes stay.

    splits: by name. paths: files of each split's images, written relative to `root`. Several processes may do so at
    once. Raises RunFolderError; the file is then as it was. MissingExtra.
    """
    parquet = _pyarrow_parquet()
    path = folder / PREDICTIONS
    with (
        _named(path),
        file_lock(folder / f".{PREDICTIONS}.lock"),
        atomic_path(path) as partial,
        parquet.ParquetWriter(partial, _schema()) as writer,
    ):
        for table in _rows_of_others(path, probe):
            writer.write_table(table)
        for split, predictions in splits.items():
            for table in _tables(probe, split, predictions, paths[split], root):
                writer.write_table(table)


def path_text(path: Path, root: Path | None) -> str:
    """The path relative to root; bytes that are not UTF-8, which Parquet refuses, as \\xNN."""
    relative = path.relative_to(root) if root is not None and path.is_relative_to(root) else path
    return relative.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtra(
            f"{PREDICTIONS} is not written: it needs pyarrow ({error}): pip install 'pyarrow>=17'"
        ) from None
    return parquet


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("probe", pa.string()),
            ("split", pa.string()),
            ("index", pa.int64()),
            ("path", pa.string()),
            ("label", pa.int32()),
            ("prediction", pa.int32()),
            ("probabilities", pa.list_(pa.float32())),
        ]
    )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of the disk or of a file that is none of predictions becomes a RunFolderError that names the file."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowInvalid:
        raise RunFolderError(
            f"{path}: damaged, or not a file of predictions; move it away and evaluate again"
        ) from None
    except OSError as error:
        raise RunFolderError(f"{path}: not written: {error.strerror or error}") from None


def _check_schema(file: Any) -> None:
    import pyarrow as pa

    if not file.schema_arrow.equals(_schema()):
        raise pa.ArrowInvalid("other columns")


def _rows_of_others(path: Path, probe: str) -> Iterator[pa.Table]:
    """The rows of other probes, one row group at a time: the file may be large."""
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    if not path.exists():
        return
    with parquet.ParquetFile(path) as file:
        _check_schema(file)
        for i in range(file.num_row_groups):
            table = file.read_row_group(i)
            others = table.filter(compute.not_equal(table["probe"], probe))
            if len(others):
                yield others


def _tables(
    probe: str, split: str, predictions: SplitPredictions, paths: Sequence[Path] | None, root: Path | None
) -> Iterator[pa.Table]:
    import pyarrow as pa

    n, classes = predictions.probabilities.shape
    size = max(1, _NUMBERS // classes)
    for start in range(0, n, size):
        rows = slice(start, start + size)
        index, probabilities = predictions.index[rows], predictions.probabilities[rows]
        texts = [None] * len(index) if paths is None else [path_text(paths[i], root) for i in index.tolist()]
        offsets = np.arange(len(index) + 1, dtype=np.int32) * classes
        columns = [
            pa.array([probe] * len(index), pa.string()),
            pa.array([split] * len(index), pa.string()),
            pa.array(index),
            pa.array(texts, pa.string()),
            pa.array(predictions.outcomes.labels[rows].astype(np.int32)),
            pa.array(predictions.outcomes.predictions[rows].astype(np.int32)),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(probabilities.reshape(-1))),
        ]
        yield pa.Table.from_arrays(columns, schema=_schema())
