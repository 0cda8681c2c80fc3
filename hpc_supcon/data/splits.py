"""Data sets by name, split into train, validation and test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, DataError, unknown_name
from .builtin import digits, synthetic
from .folder import open_folder
from .sources import ArraySource, Source, check_form, fit_images
from .stratify import stratified_split
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
    seed: int = 0,
    synthetic: Mapping[str, int] | None = None,
) -> Splits:
    """The data set called `name` (a key of SOURCES).

    root: folder of the files (not for digits and synthetic). download: fetch them where they are missing.
    image_size (pixels) and channels (1 or 3): what images are converted to; None keeps theirs.
    validation_fraction in [0, 1): share of train carved out, by class, with `seed`; 0 gives none. A data set
    with its own validation set keeps it. synthetic: arguments of `builtin.synthetic`, for that name only.

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

    path = Path(root).expanduser() if root is not None else None
    train, validation, test = SOURCES[name](Request(path, download, image_size, channels, synthetic))
    if validation is None and validation_fraction > 0:
        kept, picked = stratified_split(train.labels, fraction=validation_fraction, seed=seed)
        if len(picked) == 0:
            raise DataError("no class has two images, so no validation set can be carved: data.validation_fraction=0")
        train, validation = train.subset(kept), train.subset(picked)
    return Splits(train, validation, test)
