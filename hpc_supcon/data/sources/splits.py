"""Data sets by name, split into train, validation and test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ...errors import ConfigError, DataError, unknown_name
from ..levels import MAX_CHANNELS
from .beton import open_beton, read_manifest
from .builtin import digits, synthetic
from .convert import convert
from .folder import open_folder, open_unlabeled, unreadable_is_data_error
from .image_file import Exif
from .listing import Note
from .source import ArraySource, Source, fit_images
from .stratify import stratified_sample, stratified_split
from .vision import open_cifar, open_mnist

Labels = Literal["folders", "none"]
"""Whether the images of a folder have labels: the names of its class folders, or none."""


@dataclass(frozen=True)
class Splits:
    """Sources of equal size, channels and classes. Choices are made on validation; test is read once, at the end.

    validation: None where the data set has none and none was split off. test: None only for images without labels.
    Images without labels have no classes, and all labels are 0.
    """

    train: Source
    validation: Source | None
    test: Source | None

    @property
    def has_labels(self) -> bool:
        return bool(self.train.classes)

    @property
    def labeled_test(self) -> Source:
        """The test split, which every set with labels has."""
        assert self.test is not None
        return self.test

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def channels(self) -> int:
        return self.train.channels

    def check_two_classes(self, what: str) -> None:
        """Raise DataError where the training images are not of two classes at least; `what` needs them."""
        if not self.has_labels:
            raise DataError(f"{what} tells classes apart, but the images have no labels (data.labels=none)")
        labels = self.train.labels.unique().tolist()
        if len(labels) < 2:
            raise DataError(
                f"{what} tells classes apart, but all training images are of one, "
                f"{self.classes[labels[0]]}: add images of another class"
            )

    @property
    def image_size(self) -> int:
        return self.train.image_size


@dataclass(frozen=True)
class SourceOptions:
    """Arguments of the functions in SOURCES; see load_splits. Raises ConfigError for values outside their ranges."""

    root: Path | None = None
    download: bool = False
    image_size: int | None = None
    channels: int | None = None
    exif: Exif = "transpose"
    labels: Labels = "folders"
    synthetic: Mapping[str, int] | None = None
    note: Note | None = None

    def __post_init__(self) -> None:
        if self.channels is not None and not 1 <= self.channels <= MAX_CHANNELS:
            raise ConfigError(f"data.channels must be within 1..{MAX_CHANNELS}, not {self.channels}")
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"data.image_size must be at least 1 pixel, not {self.image_size}")


def _digits(options: SourceOptions) -> Splits:
    return _in_memory(digits(), options)


def _mnist(name: str, options: SourceOptions) -> Splits:
    return _in_memory(open_mnist(name, options.root, download=options.download), options)


def _cifar(name: str, options: SourceOptions) -> Splits:
    return _in_memory(open_cifar(name, options.root, download=options.download), options)


def _image_folder(options: SourceOptions) -> Splits:
    given: dict[str, Any] = {"image_size": options.image_size, "channels": options.channels, "exif": options.exif}
    if options.root is None:
        content = "train/CLASS/*.jpg|png and test/ or val/" if options.labels == "folders" else "images"
        raise DataError(f"image_folder needs data.root: a folder with {content}")
    if options.labels == "none":
        return Splits(*open_unlabeled(options.root, **given, note=options.note))
    return Splits(*open_folder(options.root, **given, note=options.note))


def _synthetic(options: SourceOptions) -> Splits:
    given = {"image_size": options.image_size, "channels": options.channels}
    arguments = {key: value for key, value in given.items() if value is not None} | dict(options.synthetic or {})
    train, test = synthetic(**arguments)
    return Splits(train, None, test)


def _in_memory(sources: tuple[ArraySource, ArraySource], options: SourceOptions) -> Splits:
    train, test = (
        ArraySource(
            fit_images(source.stack(), image_size=options.image_size, channels=options.channels),
            source.labels,
            source.classes,
        )
        for source in sources
    )
    return Splits(train, None, test)


SOURCES: dict[str, Callable[[SourceOptions], Splits]] = {
    "digits": _digits,
    "mnist": partial(_mnist, "mnist"),
    "fashion_mnist": partial(_mnist, "fashion_mnist"),
    "cifar10": partial(_cifar, "cifar10"),
    "cifar100": partial(_cifar, "cifar100"),
    "image_folder": _image_folder,
    "synthetic": _synthetic,
}
"""`data.source` -> the splits that the data set has itself."""


def load_splits(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = False,
    image_size: int | None = None,
    channels: int | None = None,
    exif: Exif = "transpose",
    labels: Labels = "folders",
    validation_fraction: float = 0.1,
    train_images: int | None = None,
    seed: int = 0,
    synthetic: Mapping[str, int] | None = None,
    beton: str | Path | None = None,
    check_hash: bool = True,
    note: Note | None = None,
) -> Splits:
    """The data set called `name` (a key of SOURCES), or the .beton files it was converted to.

    beton: PATH/NAME.beton means the files PATH/NAME.train.beton, NAME.test.beton and, where the data set had a
    validation split, NAME.validation.beton, as `convert_splits` writes them; `root` is then not needed. check_hash:
    see `open_beton`.

    root: folder of the files (not for digits and synthetic). download: fetch them where they are missing.
    image_size (pixels) and channels: what images are converted to; None keeps theirs. Only gray and
    RGB are converted, to each other: another number must be that of the images. exif: whether images of a
    folder are turned upright. labels: none for a folder of images without labels, see `open_unlabeled`.
    validation_fraction in [0, 1): share of train that becomes the validation split, stratified, drawn with `seed`;
    0 gives none. A data set with a validation split keeps it. train_images: train on this many of the images that
    are left, in the same proportions of classes. synthetic: arguments of `builtin.synthetic`, for that name only.
    note: receives lines about files that were passed over and classes without images; see listing.list_splits.

    Image folders are listed here and decoded by `stack`, which finds images that are damaged.
    Raises ConfigError for unknown names and values outside their ranges, DataError for missing or damaged data.
    """
    open_splits = _source(name)
    if synthetic and name != "synthetic":
        raise ConfigError(f"options of synthetic data were given, but the data is {name}")
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction must be in [0, 1), not {validation_fraction}")
    _check_labels(name, labels)
    options = SourceOptions(_folder(root), download, image_size, channels, exif, labels, synthetic, note)
    with unreadable_is_data_error():
        splits = open_splits(options) if beton is None else _open_beton(beton, name, options, check_hash=check_hash)
    train, validation = splits.train, splits.validation
    if validation is None and validation_fraction > 0:
        kept, picked = stratified_split(train.labels, fraction=validation_fraction, seed=seed)
        if len(picked) == 0:
            raise DataError(
                "no class has two images, so no validation set can be split off: set data.validation_fraction=0"
            )
        train, validation = train.subset(kept), train.subset(picked)
    if train_images is not None:
        if not 1 <= train_images <= len(train):
            raise ConfigError(f"data.train_images={train_images}: the training split has {len(train)} images")
        train = train.subset(stratified_sample(train.labels, count=train_images, seed=seed))
    return Splits(train, validation, splits.test)


def open_source(
    name: str,
    root: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    channels: int | None = None,
    exif: Exif = "transpose",
    labels: Labels = "folders",
    synthetic: Mapping[str, int] | None = None,
    note: Note | None = None,
) -> Splits:
    """The data set called `name` with the splits that it has itself. Arguments and errors: see `load_splits`."""
    with unreadable_is_data_error():
        _check_labels(name, labels)
        options = SourceOptions(_folder(root), download, image_size, channels, exif, labels, synthetic, note)
        return _source(name)(options)


def _check_labels(name: str, labels: Labels) -> None:
    if labels == "none" and name != "image_folder":
        raise ConfigError(f"data.labels=none is for image folders, but data.source={name} has labels: use folders")


def _source(name: str) -> Callable[[SourceOptions], Splits]:
    if name not in SOURCES:
        raise ConfigError(unknown_name("data.source", name, SOURCES))
    return SOURCES[name]


def _folder(root: str | Path | None) -> Path | None:
    return None if root is None else Path(root).expanduser()


def split_file(beton: Path, split: str) -> Path:
    """PATH/NAME.beton -> PATH/NAME.SPLIT.beton. Raises ConfigError for another suffix."""
    if beton.suffix != ".beton":
        raise ConfigError(f"data.beton must end in .beton, not be called {beton.name}")
    return beton.with_name(f"{beton.stem}.{split}.beton")


def convert_splits(
    name: str, splits: Splits, out: Path, *, progress: Callable[[str, int, int], None] | None = None, **options: Any
) -> dict[str, dict[str, Any]]:
    """Write the splits of the data set `name` to the files that `split_file` names; returns manifests by split.

    `options` are those of `convert`; progress(split, images written, all images).
    """
    sources = {split: source for split, source in vars(splits).items() if source is not None}
    manifests = {}
    for split, source in sources.items():
        report = None if progress is None else partial(progress, split)
        file = split_file(out, split)
        manifests[split] = convert(
            source, file, name=f"{name}/{split}", splits=list(sources), progress=report, **options
        )
    return manifests


def _open_beton(beton: str | Path, name: str, options: SourceOptions, *, check_hash: bool) -> Splits:
    files = {split: split_file(Path(beton).expanduser(), split) for split in ("train", "validation", "test")}
    written = _written_together(files)

    def open_split(split: str) -> Source:
        return open_beton(
            files[split],
            image_size=options.image_size,
            channels=options.channels,
            name=f"{name}/{split}",
            exif=options.exif,
            check_hash=check_hash,
        )

    train = open_split("train")
    if bool(train.classes) != (options.labels == "folders"):
        holds, use = ("labels", "folders") if train.classes else ("images without labels", "none")
        raise DataError(f"{files['train']} holds {holds}: use data.labels={use}")
    validation = open_split("validation") if "validation" in written else None
    return Splits(train, validation, open_split("test") if "test" in written else None)


def _written_together(files: Mapping[str, Path]) -> list[str]:
    """The splits of the conversion that wrote the file of train: one of another conversion may lie beside it.

    Manifests of 0.1 do not name them; then every file that exists is one. Raises DataError where test is of another.
    """
    train = read_manifest(files["train"]).get("splits")
    if train is not None and "test" not in train:
        return list(train)
    test = read_manifest(files["test"]).get("splits")
    if train != test:
        raise DataError(
            f"{files['train']} and {files['test'].name} are of different conversions: convert the data again"
        )
    return [split for split, file in files.items() if file.exists()] if train is None else train
