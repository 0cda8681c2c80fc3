"""Images in folders: ROOT/train/CLASS/*.jpg, with ROOT/test and/or ROOT/val in the same layout, or without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CorruptSample, DataError
from ..levels import dtype_of
from .band_file import StoredForm, encoded_stored, read_stored, stored_form
from .bands import Picture, Pixels
from .decoded import DecodedSource
from .image_file import SUFFIXES, Exif, ImageFormat, named
from .listing import Note, list_images, list_splits
from .source import channels_error, channels_first, resize_and_crop


class FolderSource(DecodedSource):
    """Source over image files, which are decoded whenever they are read."""

    def __init__(
        self, paths: Sequence[Path], labels: Tensor, classes: Sequence[str], image_format: ImageFormat
    ) -> None:
        """labels int64 [len(paths)] in 0..len(classes)-1; zeros where there are no classes."""
        assert labels.shape == (len(paths),)
        form = image_format
        super().__init__(labels, classes, form.channels, form.image_size, dtype_of(form.bits))
        self.paths: tuple[Path, ...] = tuple(paths)
        self.image_format = image_format

    def pil_image(self, i: int) -> Picture:
        """See Source.pil_image. Raises CorruptSample naming the path; DataError where its form differs."""
        return read_stored(self.paths[i], self.image_format)

    def encoded(self, i: int) -> tuple[bytes, tuple[int, int]]:
        """Image i, 8-bit gray or RGB, as the bytes of a file that every decoder reads the same; see
        image_file.encoded_image."""
        return encoded_stored(self.paths[i], self.image_format)

    def _decode(self, i: int) -> Pixels:
        image = self.pil_image(i)
        with named(f"image {self.paths[i]}"):
            return channels_first(resize_and_crop(image, self.image_size))

    def subset(self, indices: Tensor | Sequence[int]) -> FolderSource:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return FolderSource(
            [self.paths[i] for i in rows.tolist()], self.labels[rows], self.classes, self.image_format
        )


@contextmanager
def unreadable_is_data_error() -> Iterator[None]:
    """In the block, a file or folder of a data set that this user may not read, or that cannot be, is a DataError."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None


def open_folder(
    root: Path,
    *,
    image_size: int | None,
    channels: int | None,
    exif: Exif = "transpose",
    note: Note | None = None,
) -> tuple[FolderSource, FolderSource | None, FolderSource]:
    """(train, validation or None, test) of ROOT/train with ROOT/test and/or ROOT/val.

    With both, val is the validation set; where only one exists, it is the test set. Classes are the sorted names
    of the folders in train; another split may lack some of them. Files are listed, and the first ones
    of train decoded until one is whole.

    image_size (pixels) and channels (1 or 3): what images are converted to; None: all must be as the first one that
    is whole. Another number of channels, and the depth, are never converted. exif: whether images are turned upright.
    note: see listing.list_splits. Raises DataError.
    """
    if not root.is_dir():
        raise DataError(
            f"image folder {root} does not exist: name one with train/CLASS/*.jpg (data.root, or the argument)"
        )
    if not (root / "train").is_dir():
        raise DataError(
            f"{root / 'train'} does not exist: expected {root}/train/CLASS/*.jpg|png and test/ or val/; for images "
            "without labels: data.labels=none"
        )
    held_out = [name for name in ("val", "test") if (root / name).is_dir()]
    if not held_out:
        raise DataError(f"{root} has neither test/ nor val/ beside train/: one of them is needed as the test set")

    listings = list_splits(root, ("train", *held_out), SUFFIXES, note)
    classes = tuple(listings["train"])
    image_format = format_of([p for paths in listings["train"].values() for p in paths], image_size, channels, exif)

    def source(name: str) -> FolderSource:
        paths = [path for class_name in classes for path in listings[name][class_name]]
        counts = torch.tensor([len(listings[name][class_name]) for class_name in classes])
        return FolderSource(paths, torch.arange(len(classes)).repeat_interleave(counts), classes, image_format)

    return source("train"), source("val") if len(held_out) == 2 else None, source(held_out[-1])


def open_unlabeled(
    root: Path,
    *,
    image_size: int | None,
    channels: int | None,
    exif: Exif = "transpose",
    note: Note | None = None,
) -> tuple[FolderSource, FolderSource | None, FolderSource | None]:
    """(train, validation or None, test or None) of a folder of images without labels, at any depth.

    ROOT/train, with ROOT/val and ROOT/test as in `open_folder`; without ROOT/train, all images are of train.
    Arguments as of `open_folder`. Raises DataError.
    """
    if not root.is_dir():
        raise DataError(f"image folder {root} does not exist: name one with images (data.root, or the argument)")
    is_split = (root / "train").is_dir()
    held_out = [name for name in ("val", "test") if is_split and (root / name).is_dir()]
    if is_split and (beside := [path for path in sorted(root.iterdir()) if path.name.lower().endswith(SUFFIXES)]):
        raise DataError(f"image {beside[0]} is next to {root / 'train'}: move it into that folder")
    listings: dict[str, list[Path]] = {}
    for name in ("train", *held_out):
        folder = root / name if is_split else root
        listings[name], lines = list_images(folder, SUFFIXES)
        if not listings[name]:
            raise DataError(f"{folder} holds no images ({', '.join(SUFFIXES)}), at any depth")
        for line in lines:
            if note is not None:
                note(line)
    image_format = format_of(listings["train"], image_size, channels, exif)
    found: dict[str, FolderSource | None] = {
        name: FolderSource(paths, torch.zeros(len(paths), dtype=torch.int64), (), image_format)
        for name, paths in listings.items()
    }
    train = found["train"]
    assert train is not None
    return train, found["val"] if len(held_out) == 2 else None, found[held_out[-1]] if held_out else None


def format_of(paths: Sequence[Path], image_size: int | None, channels: int | None, exif: Exif) -> ImageFormat:
    """The given size and channels and, where they are None, those of the first image that is whole; its depth."""
    first, form = _first_whole(paths, exif, channels)
    width, height = form.size
    if image_size is None and width != height:
        raise DataError(f"{first} is {width}x{height} pixels, not square: set data.image_size to resize and crop")
    if channels not in (None, 1, 3) and form.channels != channels:
        raise channels_error(f"image {first} has", form.channels, channels)
    return ImageFormat(
        channels=channels or form.channels,
        image_size=image_size or width,
        convert=channels is not None,
        resize=image_size is not None,
        reference=first,
        exif=exif,
        bits=form.bits,
    )


def _first_whole(paths: Sequence[Path], exif: Exif, channels: int | None) -> tuple[Path, StoredForm]:
    """The first image that decodes, and its form. Raises the error of the first one if none does, and DataError for
    an image that is whole but never read."""
    damaged: CorruptSample | None = None
    for path in paths:
        try:
            return path, stored_form(path, exif, channels)
        except CorruptSample as error:
            damaged = damaged or error
    assert damaged is not None  # a class has images
    raise damaged
