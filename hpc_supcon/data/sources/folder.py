"""Images in folders: ROOT/train/CLASS/*.jpg, with ROOT/test and/or ROOT/val in the same form."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ...errors import CorruptSample, DataError
from .source import check_form, stack_images

SUFFIXES = (".jpg", ".jpeg", ".png")
CHANNELS_OF_MODE = {"L": 1, "RGB": 3}
DEEP_MODES = ("I", "F")  # 16 and 32 bits: squeezing them into 8 needs a range that only their owner knows
MODE_OF_CHANNELS = {1: "L", 3: "RGB"}
IGNORED = ("thumbs.db", "desktop.ini")
"""What desktops leave behind; names that begin with a dot are ignored too."""

# Everything Pillow was seen to raise on damaged bytes. A Warning arrives as an exception where the caller
# made warnings errors.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, struct.error)
_PILLOW_ERRORS = (*DECODE_ERRORS, Image.DecompressionBombError, Warning)


@dataclass(frozen=True)
class Form:
    """What every image of the data set must be, or is made into."""

    channels: int
    image_size: int
    convert: bool
    """`channels` was asked for: convert every mode to it. Otherwise another mode is an error."""
    resize: bool
    """`image_size` was asked for: resize every size to it. Otherwise another size is an error."""
    reference: Path
    """The image whose mode and size stand for all where nothing was asked for."""


class FolderSource:
    """Source over image files; decoded when read, nothing kept."""

    def __init__(self, paths: Sequence[Path], labels: Tensor, classes: Sequence[str], form: Form) -> None:
        """labels int64 [len(paths)] in 0..len(classes)-1."""
        assert labels.dtype == torch.int64
        assert labels.shape == (len(paths),)
        self.paths = tuple(paths)
        self.labels = labels
        self.classes = tuple(classes)
        self.form = form
        self.channels = form.channels
        self.image_size = form.image_size

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> Tensor:
        """uint8 [C, S, S]. Raises CorruptSample naming the path; DataError where mode or size differ."""
        return torch.from_numpy(_decode(self.paths[i], self.form).copy())  # Pillow's own memory is read-only

    def picture(self, i: int) -> Image.Image:
        """See Source.picture. Raises as `read`."""
        return _picture(self.paths[i], self.form)

    def encoded(self, i: int) -> tuple[bytes, tuple[int, int]]:
        """A file of image i in the source's form, for other decoders, and (width, height); only its header was read.

        Modes that decoders convert each in their own way (palettes, CMYK, transparency) are converted here.
        Raises as `read`, but for damage behind the header.
        """
        path = self.paths[i]
        with _opened(path) as image:
            _check_mode(path, image.mode, self.form)
            _check_size(path, image.size, self.form)
            if image.mode in CHANNELS_OF_MODE:
                return path.read_bytes(), image.size
        buffer, picture = io.BytesIO(), self.picture(i)
        picture.save(buffer, "PPM")
        return buffer.getvalue(), picture.size

    def stack(self) -> Tensor:
        """See stack_images. Raises as `read`."""
        form = self.form
        shape = (form.channels, form.image_size, form.image_size)
        return stack_images(lambda i: _decode(self.paths[i], form), len(self), shape)

    def subset(self, indices: Tensor | Sequence[int]) -> FolderSource:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return FolderSource([self.paths[i] for i in rows.tolist()], self.labels[rows], self.classes, self.form)


def open_folder(
    root: Path, *, image_size: int | None, channels: int | None
) -> tuple[FolderSource, FolderSource | None, FolderSource]:
    """(train, validation or None, test) of ROOT/train with ROOT/test and/or ROOT/val.

    With both, val is the validation set; the only one there is is the test set. Classes are the sorted names
    of the folders in train. Files are listed, one image is looked at, none is decoded yet. Raises DataError.
    """
    check_form(image_size, channels)
    if not root.is_dir():
        raise DataError(f"image folder {root} does not exist: set data.root to a folder that holds train/CLASS/*.jpg")
    if not (root / "train").is_dir():
        raise DataError(f"{root / 'train'} does not exist: expected {root}/train/CLASS/*.jpg|png and test/ or val/")
    held_out = [name for name in ("val", "test") if (root / name).is_dir()]
    if not held_out:
        raise DataError(f"{root} has neither test/ nor val/ beside train/: one of them is needed as the test set")

    listings = {name: _list_split(root / name) for name in ("train", *held_out)}
    classes = tuple(listings["train"])
    for name in held_out:
        _same_classes(root, name, set(classes), set(listings[name]))
    form = _form_of(next(iter(listings["train"].values()))[0], image_size, channels)

    def source(name: str) -> FolderSource:
        paths = [path for class_name in classes for path in listings[name][class_name]]
        counts = torch.tensor([len(listings[name][class_name]) for class_name in classes])
        return FolderSource(paths, torch.arange(len(classes)).repeat_interleave(counts), classes, form)

    return source("train"), source("val") if len(held_out) == 2 else None, source(held_out[-1])


def _list_split(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both sorted."""
    listing: dict[str, list[Path]] = {}
    for entry in _visible(folder):
        if entry.is_dir():
            listing[entry.name] = _list_class(entry)
        elif entry.suffix.lower() in SUFFIXES:
            raise DataError(f"image {entry} lies beside the class folders: move it into one of them")
        elif entry.is_symlink() and not entry.exists():
            raise DataError(f"{entry} is a link that leads nowhere: expected a class folder")
    if not listing:
        raise DataError(f"{folder} holds no class folders: expected {folder}/CLASS/*.jpg|png")
    return listing


def _list_class(folder: Path) -> list[Path]:
    """The images of one class. What is neither image nor desktop litter is an error: skipping it might lose data."""
    files = _visible(folder)
    if not files:
        raise DataError(f"class folder {folder} holds no images: fill it or remove it")
    for file in files:
        if file.is_dir():
            raise DataError(f"{file} is a folder within a class folder: images must lie in {folder} itself")
        if file.suffix.lower() not in SUFFIXES:
            raise DataError(f"{file} is not an image file ({', '.join(SUFFIXES)}): convert it or move it elsewhere")
    return files


def _visible(folder: Path) -> list[Path]:
    names = sorted(os.listdir(folder))  # noqa: PTH208 (names are cheaper than paths to sort by the million)
    return [folder / name for name in names if not name.startswith(".") and name.lower() not in IGNORED]


def _same_classes(root: Path, name: str, train: set[str], other: set[str]) -> None:
    missing, extra = sorted(train - other), sorted(other - train)
    if missing or extra:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has also {', '.join(extra)}"] * bool(extra)
        raise DataError(f"the classes of {root / name} are not those of {root / 'train'}: it {' and '.join(parts)}")


def _form_of(first: Path, image_size: int | None, channels: int | None) -> Form:
    """The form asked for, completed by the first image's own where nothing was."""
    with _opened(first) as image:
        width, height = image.size
        if image_size is None and width != height:
            raise DataError(f"{first} is {width}x{height} pixels, not square: set data.image_size to resize and crop")
        if image.mode.startswith(DEEP_MODES) or (channels is None and image.mode not in CHANNELS_OF_MODE):
            raise _mode_error(first, image.mode)
        return Form(
            channels=channels or CHANNELS_OF_MODE[image.mode],
            image_size=image_size or width,
            convert=channels is not None,
            resize=image_size is not None,
            reference=first,
        )


def _decode(path: Path, form: Form) -> npt.NDArray[np.uint8]:
    """uint8 [C, S, S] in the asked-for form; EXIF orientation is not applied, as in torchvision."""
    pixels = np.asarray(fitted(_picture(path, form), form.image_size), dtype=np.uint8)
    return pixels[None] if form.channels == 1 else pixels.transpose(2, 0, 1)


def _picture(path: Path, form: Form) -> Image.Image:
    """The image in the asked-for channels and its own size."""
    with _opened(path) as image:
        _check_mode(path, image.mode, form)
        _check_size(path, image.size, form)
        try:
            image.load()
            if "transparency" in image.info and image.mode == "P":
                image = image.convert("RGBA")  # Pillow warns about the direct way: transparent pixels are undefined
            return image.convert(MODE_OF_CHANNELS[form.channels])
        except _PILLOW_ERRORS as error:
            raise CorruptSample(f"image {path} does not decode: {error}") from error


def fitted(picture: Image.Image, size: int) -> Image.Image:
    """The picture with its shorter side resized to `size` pixels, and the central square of that."""
    width, height = picture.size
    if (width, height) == (size, size):
        return picture
    short = min(width, height)
    picture = picture.resize(
        (size * width // short, size * height // short), Image.Resampling.BILINEAR
    )  # antialiased
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _check_mode(path: Path, mode: str, form: Form) -> None:
    if mode.startswith(DEEP_MODES) or (mode not in CHANNELS_OF_MODE and not form.convert):
        raise _mode_error(path, mode)
    if not form.convert and CHANNELS_OF_MODE[mode] != form.channels:
        raise DataError(
            f"image {path} has mode {mode} but {form.reference} has {form.channels} channel(s): "
            f"set data.channels=3 to convert all to RGB, or data.channels=1 to gray"
        )


def _check_size(path: Path, size: tuple[int, int], form: Form) -> None:
    expected = (form.image_size, form.image_size)
    if not form.resize and size != expected:
        raise DataError(
            f"images of mixed sizes: {form.reference} is {expected[0]}x{expected[1]}, "
            f"{path} is {size[0]}x{size[1]}: set data.image_size to resize all"
        )


def _mode_error(path: Path, mode: str) -> DataError:
    if mode.startswith(("I", "F")):
        return DataError(f"image {path} has more than 8 bits per channel (mode {mode}): convert it to 8 bits first")
    return DataError(
        f"image {path} has mode {mode}, neither gray nor RGB: data.channels=3 converts all images to RGB"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image with its header read. Raises CorruptSample where there is none to read, or too many pixels.

    Pillow refuses only twice its limit and warns before; turning its warning into an error would take filters
    that belong to the whole process, and images are opened in threads.
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
