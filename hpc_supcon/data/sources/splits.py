"""Data sets by name, split into train, validation and test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError, unknown_name
from ...parts import find
from .beton_splits import open_beton_splits, split_file
from .by_name import OWN_SOURCES, SOURCES, Found, Labels, SourceOptions
from .convert import convert
from .datasets import Datasets, dataset_splits
from .folder import unreadable_is_data_error
from .source import Source
from .stratify import stratified_sample, stratified_split


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


def load_splits(
    name: str,
    *,
    validation_fraction: float = 0.1,
    train_images: int | None = None,
    seed: int = 0,
    beton: str | Path | None = None,
    check_hash: bool = True,
    datasets: Datasets | None = None,
    **options: Any,
) -> Splits:
    """The data set called `name` (a key of SOURCES), or the .beton files it was converted to, or `datasets`.

    options: fields of SourceOptions, which say what is opened and how. validation_fraction in [0, 1): share of train
    that becomes the validation split, stratified, drawn with `seed`; 0 gives none. A data set with a validation split
    keeps it. train_images: train on this many of the images that are left, in the same proportions of classes.

    beton: PATH/NAME.beton means the files PATH/NAME.train.beton, NAME.test.beton and, where the data set had a
    validation split, NAME.validation.beton, as `convert_splits` writes them; `root` is then not needed. check_hash:
    see `open_beton`; of the ranks that share files, one is enough to check them.

    datasets: torch Datasets, see `dataset_splits`; `name` then names them in messages, and of the options
    image_size, channels, labels and note count.

    Files are listed here and decoded by `stack`, which finds images that are damaged.
    Raises ConfigError for unknown names and values outside their ranges, DataError for missing or damaged data.
    """
    if datasets is None and (own := find("sources", name, SOURCES)) is not None:
        datasets = own.build(options.get("arguments"), root=options.get("root"))
    if options.get("synthetic") and name != "synthetic":
        raise ConfigError(f"options of synthetic data were given, but the data is {name}")
    if datasets is not None and beton is not None:
        raise ConfigError(f"data.beton={beton}: .beton files are not made of {name}; use data.beton=null")
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction must be in [0, 1), not {validation_fraction}")
    given = SourceOptions(**{"check_files": check_hash, **options})
    with unreadable_is_data_error():
        if datasets is not None:
            found: Found = _given(datasets, name, given)
        elif beton is not None:
            _check_name(name, given.labels)
            found = _converted(beton, name, given, check_hash=check_hash)
        else:
            found = _open(name, given)
    return _with_validation(Splits(*found), validation_fraction, train_images, seed)


def _with_validation(splits: Splits, validation_fraction: float, train_images: int | None, seed: int) -> Splits:
    """See load_splits."""
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


def open_source(name: str, root: str | Path | None = None, **options: Any) -> Splits:
    """The data set called `name` with the splits that it has itself. Options and errors: see `load_splits`."""
    with unreadable_is_data_error():
        return Splits(*_open(name, SourceOptions(root, **options)))


def _open(name: str, options: SourceOptions) -> Found:
    _check_name(name, options.labels)
    return SOURCES[name](options)


def _check_name(name: str, labels: Labels) -> None:
    if name not in SOURCES:
        raise ConfigError(unknown_name("data.source", name, SOURCES))
    if labels == "none" and name not in OWN_SOURCES:
        raise ConfigError(
            f"data.labels=none is for images of your own ({', '.join(OWN_SOURCES)}), but data.source={name} has "
            "labels: use folders"
        )


def _given(datasets: Datasets, origin: str, options: SourceOptions) -> Found:
    return dataset_splits(
        datasets,
        image_size=options.image_size,
        channels=options.channels,
        has_labels=options.labels != "none",
        origin=origin,
        note=options.note,
    )


def _converted(beton: str | Path, name: str, options: SourceOptions, *, check_hash: bool) -> Found:
    return open_beton_splits(
        beton,
        name,
        image_size=options.image_size,
        channels=options.channels,
        exif=options.exif,
        has_labels=options.labels != "none",
        check_hash=check_hash,
    )


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
