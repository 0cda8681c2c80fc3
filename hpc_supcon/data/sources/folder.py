"""Images in folders: ROOT/train/CLASS/*.jpg, with ROOT/test and/or ROOT/val in the same layout."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...errors import CorruptSample, DataError
from .listing import Note, list_splits
from .source import Pixels, channels_first, resize_and_crop, stack_images

SUFFIXES = (".jpg", ".jpeg", ".png")
CHANNELS_OF_MODE = {"L": 1, "RGB": 3}
DEEP_MODES = ("I", "F")  # 16 and 32 bits: converting them to 8 needs their range, which only their owner knows
MODE_OF_CHANNELS = {1: "L", 3: "RGB"}

# Everything that Pillow has been seen to raise for damaged bytes. A Warning is raised where the caller turned
# warnings into errors.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, struct.error)
_PILLOW_ERRORS = (*DECODE_ERRORS, Image.DecompressionBombError, Warning)


@dataclass(frozen=True)
class ImageFormat:
    """Channels and size that every image of the data set must have, or is converted to."""

    channels: int
    image_size: int
    convert: bool
    """Whether `channels` is set: convert every mode to it. Otherwise another mode is an error."""
    resize: bool
    """Whether `image_size` is set: resize every image to it. Otherwise another size is an error."""
    reference: Path
    """The image whose mode and size all others must have where these are not set."""


class FolderSource:
    """Source over image files, which are decoded whenever they are read."""

    def __init__(
        self, paths: Sequence[Path], labels: Tensor, classes: Sequence[str], image_format: ImageFormat
    ) -> None:
        """labels int64 [len(paths)] in 0..len(classes)-1."""
        assert labels.dtype == torch.int64
        assert labels.shape == (len(paths),)
        self.paths = tuple(paths)
        self.labels = labels
        self.classes = tuple(classes)
        self.image_format = image_format
        self.channels = image_format.channels
        self.image_size = image_format.image_size

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> Tensor:
        """uint8 [C, S, S]. Raises CorruptSample naming the path; DataError where mode or size differ."""
        return torch.from_numpy(_decode(self.paths[i], self.image_format).copy())  # Pillow's own memory is read-only

    def pil_image(self, i: int) -> Image.Image:
        """See Source.pil_image. Raises as `read`."""
        return _pil_image(self.paths[i], self.image_format)

    def encoded(self, i: int) -> tuple[bytes, tuple[int, int]]:
        """Image i as the bytes of a file, for other decoders, and its (width, height).

        Modes that every decoder converts in its own way (palettes, CMYK, transparency) are converted here. Raises
        as `read`, but only the header is read: damage after it is not found.
        """
        path = self.paths[i]
        with _opened(path) as image:
            _check_mode(path, image.mode, self.image_format)
            _check_size(path, image.size, self.image_format)
            if image.mode in CHANNELS_OF_MODE:
                return path.read_bytes(), image.size
        buffer, converted = io.BytesIO(), self.pil_image(i)
        converted.save(buffer, "PPM")
        return buffer.getvalue(), converted.size

    def stack(self) -> Tensor:
        """See stack_images. Raises as `read`."""
        shape = (self.channels, self.image_size, self.image_size)
        return stack_images(lambda i: _decode(self.paths[i], self.image_format), len(self), shape)

    def subset(self, indices: Tensor | Sequence[int]) -> FolderSource:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return FolderSource(
            [self.paths[i] for i in rows.tolist()], self.labels[rows], self.classes, self.image_format
        )


def open_folder(
    root: Path, *, image_size: int | None, channels: int | None, note: Note | None = None
) -> tuple[FolderSource, FolderSource | None, FolderSource]:
    """(train, validation or None, test) of ROOT/train with ROOT/test and/or ROOT/val.

    With both, val is the validation set; where only one exists, it is the test set. Classes are the sorted names
    of the folders in train; another split may lack some of them. Files are listed and the header of one image is
    read; none is decoded yet.

    image_size (pixels) and channels (1 or 3): what images are converted to; None: all must be as the first one.
    note: see listing.list_splits. Raises DataError.
    """
    if not root.is_dir():
        raise DataError(f"image folder {root} does not exist: set data.root to a folder with train/CLASS/*.jpg")
    if not (root / "train").is_dir():
        raise DataError(f"{root / 'train'} does not exist: expected {root}/train/CLASS/*.jpg|png and test/ or val/")
    held_out = [name for name in ("val", "test") if (root / name).is_dir()]
    if not held_out:
        raise DataError(f"{root} has neither test/ nor val/ beside train/: one of them is needed as the test set")

    listings = list_splits(root, ("train", *held_out), SUFFIXES, note)
    classes = tuple(listings["train"])
    image_format = _format_of(next(iter(listings["train"].values()))[0], image_size, channels)

    def source(name: str) -> FolderSource:
        paths = [path for class_name in classes for path in listings[name][class_name]]
        counts = torch.tensor([len(listings[name][class_name]) for class_name in classes])
        return FolderSource(paths, torch.arange(len(classes)).repeat_interleave(counts), classes, image_format)

    return source("train"), source("val") if len(held_out) == 2 else None, source(held_out[-1])


def _format_of(first: Path, image_size: int | None, channels: int | None) -> ImageFormat:
    """The given size and channels, or those of the first image where they are None."""
    with _opened(first) as image:
        width, height = image.size
        if image_size is None and width != height:
            raise DataError(f"{first} is {width}x{height} pixels, not square: set data.image_size to resize and crop")
        if image.mode.startswith(DEEP_MODES) or (channels is None and image.mode not in CHANNELS_OF_MODE):
            raise _mode_error(first, image.mode)
        return ImageFormat(
            channels=channels or CHANNELS_OF_MODE[image.mode],
            image_size=image_size or width,
            convert=channels is not None,
            resize=image_size is not None,
            reference=first,
        )


def _decode(path: Path, image_format: ImageFormat) -> Pixels:
    """uint8 [C, S, S]; EXIF orientation is not applied, as in torchvision."""
    return channels_first(resize_and_crop(_pil_image(path, image_format), image_format.image_size))


def _pil_image(path: Path, image_format: ImageFormat) -> Image.Image:
    """The image in the channels of the format and its own size."""
    with _opened(path) as image:
        _check_mode(path, image.mode, image_format)
        _check_size(path, image.size, image_format)
        try:
            image.load()
            if "transparency" in image.info and image.mode == "P":
                image = image.convert("RGBA")  # Pillow warns about the direct conversion, whose result is undefined
            return image.convert(MODE_OF_CHANNELS[image_format.channels])
        except _PILLOW_ERRORS as error:
            raise CorruptSample(f"image {path} does not decode: {error}") from error


def _check_mode(path: Path, mode: str, image_format: ImageFormat) -> None:
    if mode.startswith(DEEP_MODES) or (mode not in CHANNELS_OF_MODE and not image_format.convert):
        raise _mode_error(path, mode)
    if not image_format.convert and CHANNELS_OF_MODE[mode] != image_format.channels:
        raise DataError(
            f"image {path} has mode {mode} but {image_format.reference} has {image_format.channels} channel(s): "
            f"set data.channels=3 to convert all to RGB, or data.channels=1 to gray"
        )


def _check_size(path: Path, size: tuple[int, int], image_format: ImageFormat) -> None:
    expected = (image_format.image_size, image_format.image_size)
    if not image_format.resize and size != expected:
        raise DataError(
            f"images of mixed sizes: {image_format.reference} is {expected[0]}x{expected[1]}, "
            f"{path} is {size[0]}x{size[1]}: set data.image_size to resize all"
        )


def _mode_error(path: Path, mode: str) -> DataError:
    if mode.startswith(DEEP_MODES):
        return DataError(f"image {path} has more than 8 bits per channel (mode {mode}): convert it to 8 bits first")
    return DataError(
        f"image {path} has mode {mode}, which is neither gray nor RGB: data.channels=3 converts all images to RGB"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image with its header read. Raises CorruptSample for a header that is damaged or names too many pixels.

    Pillow raises only above twice its limit, and warns below that. Turning its warning into an error would need
    warning filters, which belong to the whole process, while images are opened in threads.
    """
    try:
        image = Image.open(path)
    except _PILLOW_ERRORS as error:
        reason = "the file is empty" if _is_empty(path) else str(error)
        raise CorruptSample(f"image {path} does not decode: {reason}") from error
    with image:
        pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
        if limit is not None and pixels > limit:
            raise CorruptSample(f"image {path} does not decode: its {pixels} pixels exceed Pillow's limit of {limit}")
        yield image


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0
