"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, read from the files that torchvision downloads."""

from __future__ import annotations

import fcntl
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity

from ...errors import DataError
from .source import ArraySource

MNIST_LIKE = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}
CIFAR_LIKE = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
_PARTS = ("train", "t10k")  # as the files of train and test are called


def open_mnist(name: str, root: Path | None, *, download: bool) -> tuple[ArraySource, ArraySource]:
    """(train, test) of `mnist` or `fashion_mnist`: gray 28x28, four idx files in ROOT/MNIST/raw.

    Raises DataError where files are missing, cannot be downloaded, or are damaged (the file is named).
    """
    kind: Any = MNIST_LIKE[name]
    root = _root(name, root)
    raw = root / kind.__name__ / "raw"
    files = {part: (raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte") for part in _PARTS}
    if download:
        _download(kind, root)
    for file in (file for pair in files.values() for file in pair):
        if not file.is_file():
            raise _missing(name, file)

    classes = tuple(str(c) for c in kind.classes)
    train, test = (_read_idx_pair(*files[part], classes) for part in _PARTS)
    return train, test


def _read_idx_pair(images_file: Path, labels_file: Path, classes: tuple[str, ...]) -> ArraySource:
    images, labels = _read_idx(read_image_file, images_file), _read_idx(read_label_file, labels_file)
    if len(images) != len(labels):
        raise DataError(f"{images_file} contains {len(images)} images but {labels_file} {len(labels)} labels")
    if len(images) == 0:
        raise DataError(f"{images_file} contains no images")
    if images.shape[1] != images.shape[2]:
        raise DataError(f"the images in {images_file} are {images.shape[2]}x{images.shape[1]} pixels, not square")
    if int(labels.max()) >= len(classes):
        raise DataError(f"{labels_file} is damaged: label {int(labels.max())}, but there are {len(classes)} classes")
    return ArraySource(images.unsqueeze(1), labels, classes)


def _read_idx(reader: Any, file: Path) -> Tensor:
    try:
        return reader(str(file))
    # What torchvision's reader raises for files that are truncated, empty, or not idx files.
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "not the header of an idx file"
        raise DataError(f"{file} is damaged ({reason}): delete it and set data.download=true") from error


def open_cifar(name: str, root: Path | None, *, download: bool) -> tuple[ArraySource, ArraySource]:
    """(train, test) of `cifar10` or `cifar100`: RGB 32x32, pickles in ROOT/cifar-10-batches-py or -100-python.

    A pickle can execute code when read, so none is read unless its md5 is the published one. Raises
    DataError where files are missing, cannot be downloaded, or are not the published ones (the file is named).
    """
    kind: Any = CIFAR_LIKE[name]
    root = _root(name, root)
    if download:
        _download(kind, root)
    published = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    for filename, md5 in published:
        file = root / kind.base_folder / filename
        if not file.is_file():
            raise _missing(name, file)
        if not check_integrity(file, md5):
            raise DataError(
                f"{file} is damaged (its md5 is not the published one): delete it, set data.download=true"
            )
    train, test = (_read_cifar(kind, root, train=part) for part in (True, False))
    return train, test


def _read_cifar(kind: Any, root: Path, *, train: bool) -> ArraySource:
    with warnings.catch_warnings():
        # The published pickles contain NumPy dtypes in a form that recent NumPy deprecates.
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
        try:
            data = kind(root, train=train)  # verifies md5 again before it unpickles
        except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise DataError(f"{root / kind.base_folder} cannot be read: {error}") from error
    images = torch.from_numpy(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)))
    return ArraySource(images, torch.tensor(data.targets, dtype=torch.int64), data.classes)


def _root(name: str, root: Path | None) -> Path:
    if root is None:
        raise DataError(
            f"{name} needs data.root: the folder of its files, or (with data.download=true) where to download them"
        )
    return root


def _missing(name: str, file: Path) -> DataError:
    return DataError(f"{name}: {file} does not exist: set data.root=PATH to where it is, or data.download=true")


def _download(kind: Any, root: Path) -> None:
    """Fetch missing files. Ranks on one machine do so one after the other; all but the first find them present."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".download.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kind(root, train=True, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise DataError(f"downloading {kind.__name__} into {root} failed: {reason[0]}") from error
