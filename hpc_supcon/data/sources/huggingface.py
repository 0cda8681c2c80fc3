"""Data sets of the package `datasets`: saved on disk, as Parquet files, or by name from the Hugging Face hub."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from ...errors import CorruptSample, DataError, MissingExtra, on_one_line
from .encoded import EncodedSplits, encoded_splits, format_of_encoded
from .image_file import Exif
from .listing import Note
from .tables import SPLIT_WORDS, Columns, numbered_labels, rows_named

HUB = "hf:"
"""Beginning of a data.root that names a data set of the hub: hf:OWNER/NAME, hf:OWNER/NAME:CONFIGURATION, with
@REVISION at the end where it is fixed."""
_HUB_NAME = re.compile(r"hf:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
_CONNECT_S = 5.0
LABELS = ("label", "labels", "fine_label", "class", "target")
"""Names of a column of labels that is no ClassLabel."""


class HuggingFaceImages:
    """See EncodedImages: the column of images of a Dataset, not decoded."""

    def __init__(self, dataset: Any, column: str, where: str) -> None:
        """dataset: datasets.Dataset with that column alone, a struct of `bytes` and `path`."""
        self._dataset, self._column, self._where = dataset, column, where

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, i: int) -> str:
        return f"{self._where}, row {i + 1}"

    def data(self, i: int) -> bytes:
        value = self._dataset[i][self._column]
        if value is None:
            raise CorruptSample(f"{self.name(i)}: it has no image")
        if value["bytes"] is not None:
            return bytes(value["bytes"])
        try:
            return Path(value["path"]).read_bytes()
        except (OSError, TypeError) as error:
            raise CorruptSample(f"{self.name(i)}: its image {value['path']} cannot be read: {error}") from error

    def sizes(self) -> None:
        return None


def open_huggingface(
    root: str,
    *,
    columns: Columns,
    image_size: int | None,
    channels: int | None,
    exif: Exif = "transpose",
    has_labels: bool = True,
    note: Note | None = None,
) -> EncodedSplits:
    """(train, validation or None, test or None; where one of these exists it is test) of a DatasetDict.

    root: a folder that `save_to_disk` wrote, a folder with Parquet files whose names begin with that of their split,
    or HUB and a name. columns: image: by default the only column of the type Image; label: the only one of the type
    ClassLabel, otherwise one of LABELS with text or integers. Nothing of a data set is executed. Other arguments: see
    open_folder. Raises DataError, MissingExtra.
    """
    if find_spec("datasets") is None:
        raise MissingExtra("data.source=huggingface needs `datasets`: pip install 'hpc-supcon[huggingface]'")
    found = _by_split(_opened(root), root)
    if "train" not in found:
        raise DataError(f"{root}: no train split, but {', '.join(found)}")
    if has_labels and len(found) == 1:
        raise DataError(f"{root}: no test split: save a DatasetDict with train and test (Dataset.train_test_split)")
    where = {split: f"{root}, {split} split" for split in found}
    image = _image_column(found["train"], columns.image, root)
    images = {split: _images(one, image, where[split]) for split, one in found.items()}
    classes: tuple[str, ...] = ()
    labels = {split: torch.zeros(len(one), dtype=torch.int64) for split, one in found.items()}
    if has_labels:
        label = _label_column(found["train"], columns.label, root)
        values = {split: _label_values(one, label, where[split]) for split, one in found.items()}
        order = getattr(found["train"].features[label], "names", None)
        classes, labels = numbered_labels(
            values, lambda split, rows: f"{where[split]}, {rows_named(rows)}", note, order
        )
    image_format = format_of_encoded(images["train"], image_size, channels, exif)
    return encoded_splits(images, labels, classes, image_format)


def _opened(root: str) -> Any:
    """A Dataset or DatasetDict. Raises DataError in one line for whatever goes wrong on disk or in the network."""
    import datasets

    datasets.disable_progress_bars()
    folder = Path(root).expanduser()
    try:
        if root.startswith(HUB):
            return _of_hub(root)
        if not folder.is_dir():
            raise DataError(
                f"{root} is no folder: name one that save_to_disk wrote, one with Parquet files, or {HUB}OWNER/NAME"
            )
        if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset("parquet", data_files=_parquet_files(folder))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{root} cannot be opened ({type(error).__name__}): {on_one_line(error)}") from error


def _of_hub(root: str) -> Any:
    """From the hub or, where it cannot be reached, from what `datasets` keeps of it on this machine."""
    import datasets

    parts = _HUB_NAME.fullmatch(root)
    if parts is None:
        raise DataError(f"data.root={root}: expected hf:OWNER/NAME, with :CONFIGURATION or @REVISION behind it")
    if _hub_is_reachable():
        return datasets.load_dataset(parts["name"], parts["config"], revision=parts["revision"])
    try:
        with _offline():
            return datasets.load_dataset(parts["name"], parts["config"], revision=parts["revision"])
    except Exception as error:
        raise DataError(
            f"{root} cannot be opened ({type(error).__name__}): {on_one_line(error)}; the hub cannot be reached from "
            "here: save it where it can be, and name the folder"
        ) from error


@contextmanager
def _offline() -> Iterator[None]:
    """Otherwise it would be tried again for half a minute, with a line each time."""
    import datasets
    import huggingface_hub

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _hub_is_reachable() -> bool:
    """Whether a connection opens, without waiting long; a proxy is asked when it is used."""
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    if getproxies():
        return True
    try:
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        socket.create_connection((endpoint.hostname or "", port), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    """Split -> its files: those in a folder of its name, or whose names begin with it, as in train-00000-of-00002."""
    files: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        parts = reversed(path.relative_to(folder).parts)
        words = (re.split(r"[^a-z]", part.lower())[0] for part in parts)
        split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)
        if split is None:
            raise DataError(f"{path}: its name says no split: call it train-..., test-... or validation-...")
        files.setdefault(split, []).append(os.fspath(path))
    if not files:
        raise DataError(f"{folder}: it holds no data set of save_to_disk and no Parquet files")
    return files


def _by_split(found: Any, root: str) -> dict[str, Any]:
    """Split -> its Dataset, in the order of train, validation, test."""
    given = found if isinstance(found, Mapping) else {"train": found}
    splits: dict[str, Any] = {}
    for name, dataset in given.items():
        split = SPLIT_WORDS.get(str(name).lower())
        if split is None:
            continue  # such as `unsupervised`, or the splits of another task
        if split in splits:
            raise DataError(f"{root}: two splits are of {split}: {', '.join(map(str, given))}")
        if len(dataset) == 0:
            raise DataError(f"{root}: the split {name} is empty")
        splits[split] = dataset
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}


def _image_column(dataset: Any, name: str | None, root: str) -> str:
    import datasets

    found = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if name is None and len(found) == 1:
        return found[0]
    if name in found:
        return str(name)
    described = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in dataset.features.items())
    if name is None:
        what = f"{len(found)} columns of images" if found else "no column of the type Image"
        raise DataError(f"{root} has {what}: {described}; set data.columns.image")
    raise DataError(f"{root}: data.columns.image={name} is no column of the type Image: {described}")


def _label_column(dataset: Any, name: str | None, root: str) -> str:
    import datasets

    features = dataset.features
    of_type = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [key for key in LABELS if key in features]
    chosen = name or (of_type[0] if len(of_type) == 1 else next((key for key in usual if not of_type), None))
    feature = features.get(chosen)
    is_plain = isinstance(feature, datasets.Value) and re.match("string|large_string|u?int|bool", feature.dtype)
    if chosen is None or not (isinstance(feature, datasets.ClassLabel) or is_plain):
        described = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
        what = "no column of labels is found by its type" if name is None else f"{name} is no column of labels"
        raise DataError(f"{root}: {what}: {described}; set data.columns.label, or data.labels=none")
    return str(chosen)


def _images(dataset: Any, column: str, where: str) -> HuggingFaceImages:
    import datasets

    if column not in dataset.features:
        raise DataError(f"{where} has no column {column!r}, which train has")
    plain = dataset.select_columns([column]).with_format(None)
    return HuggingFaceImages(plain.cast_column(column, datasets.Image(decode=False)), column, where)


def _label_values(dataset: Any, column: str, where: str) -> list[Any]:
    """Names of a ClassLabel, other values as they are; None where there is none."""
    if column not in dataset.features:
        raise DataError(f"{where} has no column {column!r}, which train has")
    values = dataset.with_format(None)[column][:]
    names = getattr(dataset.features[column], "names", None)
    if names is None:
        return list(values)
    return [names[value] if value is not None and 0 <= value < len(names) else None for value in values]
