"""Sources over map-style torch Datasets: anything with a length whose items are images or (image, label)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ...errors import CorruptSample, DataError, raised_where
from ..levels import PICTURE_CHANNELS, dtype_of, is_picture
from .bands import Bands, Picture, Pixels
from .dataset_items import DatasetItems, MapDataset
from .dataset_labels import check_range, class_names, labels_of
from .decoded import DecodedSource
from .image_file import CHANNELS_OF_MODE, MODE_OF_CHANNELS, named
from .listing import Note
from .source import channels_error

Datasets = Mapping[str, Any] | tuple[Any, ...] | MapDataset
"""{"train": ..., "test": ..., "validation": ...}, of which validation may be absent; (train, test) or (train,
validation, test); a dataset alone only for images without labels."""
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class ItemFormat:
    """Channels and size that every image of a dataset has, or is converted to."""

    channels: int
    image_size: int
    convert: bool
    """Whether `channels` is set: convert every image to it. Otherwise another number is an error."""
    resize: bool
    """Whether `image_size` is set: resize every image to it. Otherwise another size is an error."""
    bits: int = 8
    """Of each channel, 8 or 16; an image of another depth is an error."""

    @property
    def is_picture(self) -> bool:
        """Whether images are 8-bit gray or RGB, which are converted to each other; others are Bands."""
        return is_picture(self.channels, dtype_of(self.bits))


class DatasetSource(DecodedSource):
    """Source over the items of a dataset, which are read whenever they are needed. Made by `dataset_splits`."""

    def __init__(
        self, items: DatasetItems, rows: Tensor, labels: Tensor, classes: Sequence[str], item_format: ItemFormat
    ) -> None:
        """rows int64 [N]: which items are the images of this source; labels int64 [N]: zeros without classes."""
        assert rows.shape == labels.shape
        super().__init__(labels, classes, item_format.channels, item_format.image_size, dtype_of(item_format.bits))
        self.items, self.rows, self.item_format = items, rows, item_format

    def pil_image(self, i: int) -> Picture:
        """See Source.pil_image. Raises CorruptSample where the dataset raises; DataError where an image is of
        another form than the first. Both name the dataset and its item."""
        row, expected = int(self.rows[i]), self.item_format
        found, where = self.items.image(row), f"{self.items.name}: item {row}"
        image = _picture(found, where, expected) if expected.is_picture else _bands(found, where, expected)
        if not expected.resize and image.size != (self.image_size, self.image_size):
            raise DataError(
                f"{where} is {image.width}x{image.height} pixels, but the first image is "
                f"{self.image_size}x{self.image_size}: set data.image_size to resize all"
            )
        if isinstance(image, Bands):
            return image
        with named(where):
            return image.convert(MODE_OF_CHANNELS[self.channels])

    def subset(self, indices: Tensor | Sequence[int]) -> DatasetSource:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return DatasetSource(self.items, self.rows[chosen], self.labels[chosen], self.classes, self.item_format)


def _picture(found: Image.Image | Pixels, where: str, expected: ItemFormat) -> Image.Image:
    if not isinstance(found, Image.Image):
        if found.dtype != np.uint8 or len(found) not in PICTURE_CHANNELS:
            raise _other_form(found, where, expected)
        found = Image.fromarray(np.ascontiguousarray(found[0] if len(found) == 1 else found.transpose(1, 2, 0)))
    if not expected.convert and CHANNELS_OF_MODE.get(found.mode) != expected.channels:
        raise DataError(
            f"{where} is of mode {found.mode}, but the first image has {expected.channels} channel(s): set "
            "data.channels=3 to convert all to RGB, or data.channels=1 to gray"
        )
    return found


def _bands(found: Image.Image | Pixels, where: str, expected: ItemFormat) -> Bands:
    pixels = np.asarray(found) if isinstance(found, Image.Image) else found
    if isinstance(found, Image.Image) or (len(pixels), 8 * pixels.itemsize) != (expected.channels, expected.bits):
        raise _other_form(pixels, where, expected)
    return Bands(pixels)


def _other_form(pixels: Pixels, where: str, expected: ItemFormat) -> DataError:
    channels = pixels.shape[0] if pixels.ndim == 3 else 1
    return DataError(
        f"{where} has {channels} channel(s) of {8 * pixels.itemsize} bits, but the first image has "
        f"{expected.channels} of {expected.bits}: all must be alike"
    )


def dataset_splits(
    found: Datasets,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    has_labels: bool = True,
    origin: str = "source",
    note: Note | None = None,
) -> tuple[DatasetSource, DatasetSource | None, DatasetSource | None]:
    """(train, validation or None, test or None) of datasets by their splits; test is None only without labels.

    image_size (pixels) and channels: what images are converted to; None: all must be as the first one of
    train that can be read. Only 8-bit gray and RGB are converted, to each other; 2 or more than 3 channels must be
    the images' own. has_labels: whether labels are used; without, items may be images alone, and classes and
    labels are empty and zeros. origin: what names the datasets in messages. note: receives lines for the user.

    Classes are `train.classes`; without it they are the numbers up to the largest label of train. Labels are
    `dataset.targets` or `dataset.labels` where these are what items have; otherwise all items are read once. Raises
    DataError and CorruptSample, which name dataset and item.
    """
    items = _open(found, origin, has_labels=has_labels)
    train = items["train"]
    item_format = _format_of(train, image_size, channels)
    if not has_labels:
        sources = {split: _without_labels(one, item_format) for split, one in items.items()}
    else:
        labels = {split: labels_of(one.dataset, one, one.name, note) for split, one in items.items()}
        classes = class_names(train.dataset, labels["train"], train.name)
        sources = {}
        for split, one in items.items():
            check_range(labels[split], classes, one.name)
            sources[split] = DatasetSource(one, torch.arange(len(one)), labels[split], classes, item_format)
    return sources["train"], sources.get("validation"), sources.get("test")


def _open(found: Datasets, origin: str, *, has_labels: bool) -> dict[str, DatasetItems]:
    """Split -> its items, in the order of SPLITS."""
    if isinstance(found, Mapping):
        given = dict(found)
    elif isinstance(found, tuple):
        names = {1: ("train",), 2: ("train", "test"), 3: SPLITS}.get(len(found))
        if names is None:
            raise DataError(f"{origin}: {len(found)} datasets; expected (train, test) or (train, validation, test)")
        given = dict(zip(names, found, strict=True))
    else:
        given = {"train": found}
    needed = ("train", "test") if has_labels else ("train",)
    unknown, missing = sorted(map(str, given.keys() - set(SPLITS))), [key for key in needed if given.get(key) is None]
    if unknown or missing:
        what = f"unknown splits {', '.join(unknown)}" if unknown else f"no {' and no '.join(missing)} split"
        raise DataError(
            f'{origin}: {what}; give {{"train": dataset, "test": dataset}}, with "validation" where there is one'
            f"{' (torch.utils.data.random_split makes two of one)' if missing == ['test'] else ''}"
        )
    return {
        split: _items(given[split], f"{origin}, {split} split ({_type_name(given[split])})")
        for split in SPLITS
        if given.get(split) is not None
    }


def _type_name(dataset: object) -> str:
    inner = getattr(dataset, "dataset", None)
    own = type(dataset).__name__
    return own if inner is None or isinstance(dataset, DataLoader) else f"{own} of {_type_name(inner)}"


def _items(dataset: Any, name: str) -> DatasetItems:
    if isinstance(dataset, DataLoader):
        raise DataError(f"{name}: a DataLoader cannot be shuffled, sharded and resumed here: give its dataset")
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            f"{name}: it has no length and no items by number: give a map-style dataset, with __len__ and __getitem__"
        )
    try:
        n = len(dataset)
    except Exception as error:
        raise DataError(f"{name}: its length raised {raised_where(error)}") from error
    if n == 0:
        raise DataError(f"{name}: it is empty")
    return DatasetItems(dataset, name)


def _without_labels(items: DatasetItems, item_format: ItemFormat) -> DatasetSource:
    n = len(items)
    return DatasetSource(items, torch.arange(n), torch.zeros(n, dtype=torch.int64), (), item_format)


def _format_of(train: DatasetItems, image_size: int | None, channels: int | None) -> ItemFormat:
    """The given size and channels and, where they are None, those of the first image that can be read."""
    i, image = _first_whole(train)
    where = f"{train.name}: item {i}"
    if not np.array_equal(np.asarray(image), np.asarray(train.image(i))):
        raise DataError(
            f"{where} is another image when it is asked for again: leave random transforms out of the dataset; views "
            "are made by augment.policy"
        )
    bits = 8
    if isinstance(image, Image.Image):
        (width, height), found = image.size, CHANNELS_OF_MODE.get(image.mode)
    else:
        (found, height, width), bits = image.shape, 8 * image.itemsize
    if image_size is None and width != height:
        raise DataError(f"{where} is {width}x{height} pixels, not square: set data.image_size to resize and crop")
    if channels is None and found is None:
        raise DataError(f"{where} is neither gray nor RGB: data.channels=3 converts all images to RGB")
    converts = bits == 8 and channels in PICTURE_CHANNELS and found in (None, *PICTURE_CHANNELS)
    if channels not in (None, found) and not converts:
        raise channels_error(f"{where} has", found or 0, channels or 0)
    return ItemFormat(channels or found or 3, image_size or width, channels is not None, image_size is not None, bits)


def _first_whole(items: DatasetItems) -> tuple[int, Image.Image | Pixels]:
    """The first image that can be read, and its index. Raises the error of the first one if there is none."""
    damaged: CorruptSample | None = None
    for i in range(len(items)):
        try:
            return i, items.image(i)
        except CorruptSample as error:
            damaged = damaged or error
    assert damaged is not None  # it is not empty
    raise damaged
