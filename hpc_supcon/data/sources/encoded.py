"""A source over image files that lie in archives or tables, which are decoded whenever they are read.

What reads files reads these too: each is a path that opens to its bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PosixPath
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..levels import dtype_of
from .band_file import encoded_stored, read_stored
from .bands import Picture, Pixels
from .decoded import DecodedSource
from .folder import format_of
from .image_file import Exif, ImageFormat, named
from .source import channels_first, resize_and_crop
from .tables import arranged


class EncodedImages(Protocol):
    """Image files by number. Can be sent to other processes, and read by many threads."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Of image i in messages: where it lies, and its number or key there."""
        ...

    def data(self, i: int) -> bytes:
        """The bytes of the file. Raises CorruptSample where they are not there."""
        ...

    def sizes(self) -> npt.NDArray[np.int64] | None:
        """Bytes of every file, int64 [N], where they are known without reading them."""
        ...


class EncodedFile(PosixPath):
    """One of EncodedImages, as the file that it would be: its path is its name in messages."""

    images: EncodedImages
    number: int

    @classmethod
    def of(cls, images: EncodedImages, i: int) -> EncodedFile:
        file = cls(images.name(i))
        file.images, file.number = images, i
        return file

    def open(self, *_: Any, **__: Any) -> Any:
        """Its bytes, to be read. Raises as EncodedImages.data."""
        return io.BytesIO(self.images.data(self.number))

    def stat(self, **_: Any) -> NoReturn:
        """There is no such file on disk."""
        raise FileNotFoundError(os.fspath(self))


class EncodedSource(DecodedSource):
    """Source over EncodedImages."""

    def __init__(
        self, images: EncodedImages, rows: Tensor, labels: Tensor, classes: Sequence[str], image_format: ImageFormat
    ) -> None:
        """rows int64 [N]: which of `images` these are; labels int64 [N]: theirs, zeros without classes."""
        assert rows.shape == labels.shape
        form = image_format
        super().__init__(labels, classes, form.channels, form.image_size, dtype_of(form.bits))
        self.images, self.rows, self.image_format = images, rows, image_format

    def name(self, i: int) -> str:
        """See EncodedImages.name."""
        return self.images.name(int(self.rows[i]))

    def data(self, i: int) -> bytes:
        """The bytes of image i. Raises CorruptSample."""
        return self.images.data(int(self.rows[i]))

    def sizes(self) -> npt.NDArray[np.int64] | None:
        """See EncodedImages.sizes."""
        sizes = self.images.sizes()
        return None if sizes is None else sizes[self.rows.numpy()]

    def pil_image(self, i: int) -> Picture:
        """See Source.pil_image. Raises CorruptSample naming the image; DataError where its form differs."""
        return read_stored(self._file(i), self.image_format)

    def _file(self, i: int) -> EncodedFile:
        return EncodedFile.of(self.images, int(self.rows[i]))

    def encoded(self, i: int) -> tuple[bytes, tuple[int, int]]:
        """Image i, 8-bit gray or RGB, as the bytes of a file that every decoder reads the same; see
        image_file.encoded_image."""
        return encoded_stored(self._file(i), self.image_format)

    def _decode(self, i: int) -> Pixels:
        image = self.pil_image(i)
        with named(f"image {self.name(i)}"):
            return channels_first(resize_and_crop(image, self.image_size))

    def subset(self, indices: Tensor | Sequence[int]) -> EncodedSource:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return EncodedSource(self.images, self.rows[chosen], self.labels[chosen], self.classes, self.image_format)


class _Files(Sequence[Path]):
    """The files of images, each made when it is asked for."""

    def __init__(self, images: EncodedImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> Path:  # type: ignore[override]
        if i >= len(self):
            raise IndexError(i)
        return EncodedFile.of(self._images, i)


def format_of_encoded(images: EncodedImages, image_size: int | None, channels: int | None, exif: Exif) -> ImageFormat:
    """See folder.format_of."""
    return format_of(_Files(images), image_size, channels, exif)


EncodedSplits = tuple[EncodedSource, EncodedSource | None, EncodedSource | None]
"""(train, validation or None, test or None; where one of these exists it is test)."""


def encoded_splits(
    images: Mapping[str, EncodedImages],
    labels: Mapping[str, Tensor],
    classes: Sequence[str],
    image_format: ImageFormat,
) -> EncodedSplits:
    """The sources of images by split, with their labels int64 [N]."""
    return arranged(
        {
            split: EncodedSource(one, torch.arange(len(one)), labels[split], classes, image_format)
            for split, one in images.items()
        }
    )
