"""Data sets by name, with the splits that they have themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ...errors import ConfigError, DataError
from ..levels import MAX_CHANNELS
from .builtin import digits, synthetic
from .folder import open_folder, open_unlabeled
from .huggingface import open_huggingface
from .image_file import Exif
from .listing import Note
from .manifest import open_manifest
from .source import ArraySource, Source, fit_images
from .tables import Columns
from .tar_shards import open_shards
from .vision import open_cifar, open_mnist

Labels = Literal["folders", "none"]
"""Whether images have the labels that their set gives them, such as the names of class folders, or none."""
Found = tuple[Source, Source | None, Source | None]
"""(train, validation, test)."""


@dataclass(frozen=True)
class SourceOptions:
    """What is opened, and how its images are read.

    root: folder of the files, and what else each source takes (not for digits and synthetic). download: fetch a
    missing set of torchvision. image_size (pixels) and channels: what images are converted to; None keeps theirs;
    only gray and RGB are converted, to each other. exif: whether images in files are turned upright. labels: none for
    images without labels. synthetic:
    arguments of `builtin.synthetic`. columns, image_root: of tables, see `open_manifest`, `open_huggingface` and
    `open_shards`. arguments: of a source that is a user's own code, besides root. check_files: whether files that a
    manifest names are looked for. note: receives lines about files that were passed over and classes without images.

    Raises ConfigError for values outside their ranges.
    """

    root: str | Path | None = None
    download: bool = False
    image_size: int | None = None
    channels: int | None = None
    exif: Exif = "transpose"
    labels: Labels = "folders"
    synthetic: Mapping[str, int] | None = None
    columns: Columns = field(default_factory=Columns)
    image_root: str | Path | None = None
    check_files: bool = True
    arguments: Mapping[str, Any] | None = None
    note: Note | None = None

    def __post_init__(self) -> None:
        if self.channels is not None and not 1 <= self.channels <= MAX_CHANNELS:
            raise ConfigError(f"data.channels must be within 1..{MAX_CHANNELS}, not {self.channels}")
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"data.image_size must be at least 1 pixel, not {self.image_size}")

    @property
    def folder(self) -> Path | None:
        """`root` as a path."""
        return None if self.root is None else Path(self.root).expanduser()

    @property
    def of_files(self) -> dict[str, Any]:
        """Arguments of every function that opens image files."""
        given = {"image_size": self.image_size, "channels": self.channels, "exif": self.exif}
        return {**given, "note": self.note}

    @property
    def of_tables(self) -> dict[str, Any]:
        return {**self.of_files, "columns": self.columns, "has_labels": self.labels != "none"}

    def needed_root(self, name: str, what: str) -> str:
        """Raises DataError where there is none."""
        if self.root is None or not str(self.root):
            raise DataError(f"{name} needs data.root: {what}")
        return str(self.root)


def _digits(options: SourceOptions) -> Found:
    return _in_memory(digits(), options)


def _mnist(name: str, options: SourceOptions) -> Found:
    return _in_memory(open_mnist(name, options.folder, download=options.download), options)


def _cifar(name: str, options: SourceOptions) -> Found:
    return _in_memory(open_cifar(name, options.folder, download=options.download), options)


def _image_folder(options: SourceOptions) -> Found:
    content = "train/CLASS/*.jpg|png and test/ or val/" if options.labels == "folders" else "images"
    options.needed_root("image_folder", f"a folder with {content}")
    assert options.folder is not None
    opened = open_unlabeled if options.labels == "none" else open_folder
    return opened(options.folder, **options.of_files)


def _manifest(options: SourceOptions) -> Found:
    options.needed_root("manifest", "a CSV, TSV or Parquet file, or a folder with train.csv and test.csv")
    assert options.folder is not None
    image_root = None if options.image_root is None else Path(options.image_root).expanduser()
    given = {**options.of_tables, "image_root": image_root, "check_files": options.check_files}
    return open_manifest(options.folder, **given)


def _huggingface(options: SourceOptions) -> Found:
    root = options.needed_root("huggingface", "a folder of save_to_disk or of Parquet files, or hf:OWNER/NAME")
    return open_huggingface(root, **options.of_tables)


def _webdataset(options: SourceOptions) -> Found:
    root = options.needed_root("webdataset", "a folder of tars, or a pattern such as {train,test}-{000..015}.tar")
    return open_shards(root, **options.of_tables)


def _synthetic(options: SourceOptions) -> Found:
    given = {"image_size": options.image_size, "channels": options.channels}
    arguments = {key: value for key, value in given.items() if value is not None} | dict(options.synthetic or {})
    train, test = synthetic(**arguments)
    return train, None, test


def _in_memory(sources: tuple[ArraySource, ArraySource], options: SourceOptions) -> Found:
    train, test = (
        ArraySource(
            fit_images(source.stack(), image_size=options.image_size, channels=options.channels),
            source.labels,
            source.classes,
        )
        for source in sources
    )
    return train, None, test


SOURCES: dict[str, Callable[[SourceOptions], Found]] = {
    "digits": _digits,
    "mnist": partial(_mnist, "mnist"),
    "fashion_mnist": partial(_mnist, "fashion_mnist"),
    "cifar10": partial(_cifar, "cifar10"),
    "cifar100": partial(_cifar, "cifar100"),
    "image_folder": _image_folder,
    "manifest": _manifest,
    "huggingface": _huggingface,
    "webdataset": _webdataset,
    "synthetic": _synthetic,
}
"""`data.source` -> the splits that the data set has itself."""
OWN_SOURCES = ("image_folder", "manifest", "huggingface", "webdataset")
"""Those that hold whatever images a user has at data.root, as files of their own sizes, with labels or without."""
