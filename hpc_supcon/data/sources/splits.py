"""Data sets by name, split into train, validation and test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError, unknown_name
from .beton import open_beton
from .builtin import digits, synthetic
from .convert import convert
from .folder import open_folder
from .source import ArraySource, Source, check_form, fit_images
from .stratify import stratified_sample, stratified_split
from .vision import open_cifar, open_mnist


@dataclass(frozen=True)
class Splits:
    """Sources of one form and one list of classes. Choices are made on validation; test is read once."""

    train: Source
    validation: Source | None
    test: Source

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def channels(self) -> int:
        return self.train.channels

    @property
    def image_size(self) -> int:
        return self.train.image_size


@dataclass(frozen=True)
class Request:
    """What a factory in SOURCES is asked for; see load_splits."""

    root: Path | None = None
    download: bool = False
    image_size: int | None = None
    channels: int | None = None
    synthetic: Mapping[str, int] | None = None


Opened = tuple[Source, Source | None, Source]
"""(train, validation where the data set has its own, test)."""


def _digits(request: Request) -> Opened:
    return _in_memory(digits(), request)


def _mnist(request: Request) -> Opened:
    return _in_memory(open_mnist("mnist", request.root, download=request.download), request)


def _fashion_mnist(request: Request) -> Opened:
    return _in_memory(open_mnist("fashion_mnist", request.root, download=request.download), request)


def _cifar10(request: Request) -> Opened:
    return _in_memory(open_cifar("cifar10", request.root, download=request.download), request)


def _cifar100(request: Request) -> Opened:
    return _in_memory(open_cifar("cifar100", request.root, download=request.download), request)


def _image_folder(request: Request) -> Opened:
    if request.root is None:
        raise DataError("image_folder needs data.root: a folder that holds train/CLASS/*.jpg|png and test/ or val/")
    return open_folder(request.root, image_size=request.image_size, channels=request.channels)


def _synthetic(request: Request) -> Opened:
    form = {"image_size": request.image_size, "channels": request.channels}
    options = {key: value for key, value in form.items() if value is not None} | dict(request.synthetic or {})
    train, test = synthetic(**options)
    return train, None, test


def _in_memory(opened: tuple[ArraySource, ArraySource], request: Request) -> Opened:
    train, test = (
        ArraySource(
            fit_images(part.stack(), image_size=request.image_size, channels=request.channels),
            part.labels,
            part.classes,
        )
        for part in opened
    )
    return train, None, test


SOURCES: dict[str, Callable[[Request], Opened]] = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "image_folder": _image_folder,
    "synthetic": _synthetic,
}


def load_splits(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = False,
    image_size: int | None = None,
    channels: int | None = None,
    validation_fraction: float = 0.1,
    train_images: int | None = None,
    seed: int = 0,
    synthetic: Mapping[str, int] | None = None,
    beton: str | Path | None = None,
    check_hash: bool = True,
) -> Splits:
    """The data set called `name` (a key of SOURCES), or the .beton files it was converted to.

    beton: PATH/NAME.beton stands for PATH/NAME.train.beton, NAME.test.beton and, where the data set has one of
    its own, NAME.validation.beton, as `convert_splits` writes them; `root` is then not needed. check_hash: see
    `open_beton`.

    root: folder of the files (not for digits and synthetic). download: fetch them where they are missing.
    image_size (pixels) and channels (1 or 3): what images are converted to; None keeps theirs.
    validation_fraction in [0, 1): share of train carved out, by class, with `seed`; 0 gives none. A data set
    with its own validation set keeps it. train_images: how many of what is then left for training are used, the
    mix of classes kept. synthetic: arguments of `builtin.synthetic`, for that name only.

    Image folders are listed here and decoded by `stack`, which is where damaged images come to light.
    Raises ConfigError for names and values that make no sense, DataError for data that is missing or damaged.
    """
    if name not in SOURCES:
        raise ConfigError(unknown_name("data.source", name, SOURCES))
    if synthetic and name != "synthetic":
        raise ConfigError(f"options of synthetic data were given, but the data is {name}")
    check_form(image_size, channels)
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction must be in [0, 1), not {validation_fraction}")

    train, validation, test = (
        _open_beton(Path(beton).expanduser(), name, image_size, check_hash=check_hash)
        if beton is not None
        else open_source(name, root, download=download, image_size=image_size, channels=channels, synthetic=synthetic)
    )
    if validation is None and validation_fraction > 0:
        kept, picked = stratified_split(train.labels, fraction=validation_fraction, seed=seed)
        if len(picked) == 0:
            raise DataError("no class has two images, so no validation set can be carved: data.validation_fraction=0")
        train, validation = train.subset(kept), train.subset(picked)
    if train_images is not None:
        if not 1 <= train_images <= len(train):
            raise ConfigError(f"data.train_images={train_images}: the training split has {len(train)} images")
        train = train.subset(stratified_sample(train.labels, count=train_images, seed=seed))
    return Splits(train, validation, test)


def open_source(
    name: str,
    root: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    channels: int | None = None,
    synthetic: Mapping[str, int] | None = None,
) -> Opened:
    """(train, validation or None, test) as the data set itself splits them. Raises as `load_splits`."""
    if name not in SOURCES:
        raise ConfigError(unknown_name("data.source", name, SOURCES))
    path = Path(root).expanduser() if root is not None else None
    return SOURCES[name](Request(path, download, image_size, channels, synthetic))


def split_file(beton: Path, split: str) -> Path:
    """PATH/NAME.beton -> PATH/NAME.SPLIT.beton. Raises ConfigError for another ending."""
    if beton.suffix != ".beton":
        raise ConfigError(f"data.beton must end in .beton, not be called {beton.name}")
    return beton.with_name(f"{beton.stem}.{split}.beton")


def convert_splits(
    name: str, opened: Opened, out: Path, *, progress: Callable[[str, int, int], None] | None = None, **options: Any
) -> dict[str, dict[str, Any]]:
    """Write every split of the data set `name` beside `out` (see `split_file`); manifests by split.

    `options` are those of `convert`; progress(split, done, all) is called now and then.
    """
    manifests = {}
    for split, source in zip(("train", "validation", "test"), opened, strict=True):
        if source is not None:
            tell = None if progress is None else partial(progress, split)
            file = split_file(out, split)
            manifests[split] = convert(source, file, name=f"{name}/{split}", progress=tell, **options)
    return manifests


def _open_beton(beton: Path, name: str, image_size: int | None, *, check_hash: bool) -> Opened:
    def opened(split: str) -> Source:
        return open_beton(
            split_file(beton, split), image_size=image_size, name=f"{name}/{split}", check_hash=check_hash
        )

    has_validation = split_file(beton, "validation").exists()
    return opened("train"), opened("validation") if has_validation else None, opened("test")


# Keeps these draws apart from those of the training order, which are seeded with (seed, epoch).
