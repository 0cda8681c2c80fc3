"""WebDataset tars: shards of samples KEY.jpg with KEY.cls, read by offset; see tar_index."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...errors import CorruptSample, DataError, MissingExtra
from .encoded import EncodedSplits, encoded_splits, format_of_encoded
from .image_file import Exif
from .listing import Note
from .tables import SPLIT_WORDS, Columns, numbered_labels
from .tar_index import index_of


class TarImages:
    """See EncodedImages: images at their offsets in tars."""

    def __init__(self, shards: Sequence[Path], index: Sequence[Any]) -> None:
        """index: for each shard its table of key, offset and size."""
        import pyarrow as pa

        self._shards = tuple(shards)
        table = pa.concat_tables(index).combine_chunks()
        self._keys = table.column("key")
        self._offsets, self._sizes = (table.column(name).to_numpy().astype(np.int64) for name in ("offset", "size"))
        self._shard = np.repeat(np.arange(len(index), dtype=np.int32), [len(one) for one in index])

    def __len__(self) -> int:
        return len(self._offsets)

    def name(self, i: int) -> str:
        return f"{self._shards[self._shard[i]]}, sample {self._keys[i].as_py()}"

    def data(self, i: int) -> bytes:
        shard, size = self._shards[self._shard[i]], int(self._sizes[i])
        try:
            file = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(file, size, int(self._offsets[i]))
            finally:
                os.close(file)
        except OSError as error:
            raise CorruptSample(f"{self.name(i)} cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise CorruptSample(f"{self.name(i)}: the tar was cut short since training started")
        return data

    def sizes(self) -> npt.NDArray[np.int64]:
        return self._sizes


def open_shards(
    root: str,
    *,
    columns: Columns,
    image_size: int | None,
    channels: int | None,
    exif: Exif = "transpose",
    has_labels: bool = True,
    note: Note | None = None,
) -> EncodedSplits:
    """(train, validation or None, test or None; where one of these exists it is test) of tars.

    root: a folder with tars at any depth, or a pattern as webdataset writes it, such as {train,test}-{000..015}.tar.
    The name of a tar or of its folder says its split; without labels and without such names all are of train.
    columns: see index_of. Other arguments: see open_folder. Samples are in the order of the shards, by their paths,
    and within these as they lie. Raises DataError, MissingExtra.
    """
    if find_spec("webdataset") is None:
        raise MissingExtra("data.source=webdataset needs `webdataset`: pip install 'hpc-supcon[webdataset]'")
    shards = _shards_by_split(root, has_labels=has_labels)
    index = {split: index_of(files, columns, has_labels=has_labels) for split, files in shards.items()}
    images = {split: TarImages(shards[split], tables) for split, tables in index.items()}
    for split, one in images.items():
        if len(one) == 0:
            raise DataError(f"{root}: the tars of {split} hold no samples")
    classes: tuple[str, ...] = ()
    labels = {split: torch.zeros(len(one), dtype=torch.int64) for split, one in images.items()}
    if has_labels:
        values = {
            split: [label for table in tables for label in table.column("label").to_pylist()]
            for split, tables in index.items()
        }
        classes, labels = numbered_labels(values, lambda split, rows: images[split].name(rows[0]), note)
    image_format = format_of_encoded(images["train"], image_size, channels, exif)
    return encoded_splits(images, labels, classes, image_format)


def _shards_by_split(root: str, *, has_labels: bool) -> dict[str, list[Path]]:
    """Split -> its tars in the order of their paths, train first."""
    folder = Path(root).expanduser()
    if folder.is_dir():
        found = sorted(folder.rglob("*.tar"))
        if not found:
            raise DataError(f"{root} holds no .tar")
        splits = {path: _split_of(path.relative_to(folder).parts) for path in found}
    else:
        found = _expanded(root)
        splits = {path: _split_of(path.parts[-2:]) for path in found}
    if not has_labels and not any(splits.values()):
        return {"train": found}
    if unnamed := [path for path, split in splits.items() if split is None]:
        raise DataError(
            f"{unnamed[0]}: neither its name nor that of its folder says its split: call it train-..., test-... or "
            "validation-..."
        )
    given = {split: [path for path in found if splits[path] == split] for split in ("train", "validation", "test")}
    shards = {split: paths for split, paths in given.items() if paths}
    needed = ("train", "test") if has_labels else ("train",)
    if "train" not in shards or len(shards) < len(needed):
        raise DataError(
            f"{root}: no tars of {' and '.join(split for split in needed if split not in shards)}, but of "
            f"{', '.join(shards)}: give all, as in {{train,test}}-{{000..015}}.tar"
        )
    return shards


def _expanded(pattern: str) -> list[Path]:
    """The tars that a pattern names. Raises DataError for one that does not exist."""
    from webdataset.shardlists import expand_urls

    found = []
    for text in expand_urls(pattern):
        if re.match(r"[a-z0-9]+:", text):
            raise DataError(f"{text}: tars are read by offset, which needs files on disk: copy them")
        path = Path(text).expanduser()
        if not path.is_file():
            raise DataError(f"{path} does not exist, or is no file{'' if text == pattern else f' (of {pattern})'}")
        found.append(path)
    return sorted(found)


def _split_of(parts: Sequence[str]) -> str | None:
    """The split that the name of a file says, or else that of the nearest folder which says one."""
    for part in reversed(parts):
        words = re.split(r"[^a-z]+", part.lower())
        if found := [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]:
            return found[0]
    return None
