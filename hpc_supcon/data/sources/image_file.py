"""How one image file becomes pixels: which formats are read, and what of EXIF, modes and transparency.

Pillow alone decides whether an image is damaged and what its pixels are. Whatever it raises becomes CorruptSample,
which names the file.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Literal

from PIL import ExifTags, Image, UnidentifiedImageError

from ...errors import CorruptSample, DataError
from ..levels import dtype_of, is_picture
from . import jpeg
from .listing import check_regular
from .quiet import silence_pillow

FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
"""Pillow's name of each format that is read -> the usual ends of its files' names. The content decides the format:
a PNG called x.jpg is read as a PNG. Of several frames or pages the first one is the image."""
ARRAY_SUFFIX = ".npy"
"""Of arrays of NumPy, which Pillow does not read: see array_file."""
SUFFIXES = (*(suffix for suffixes in FORMATS.values() for suffix in suffixes), ARRAY_SUFFIX)
_NAMES = "JPEG, PNG, WebP, BMP, GIF or TIFF"

CHANNELS_OF_MODE = {"L": 1, "RGB": 3}
MODE_OF_CHANNELS = {1: "L", 3: "RGB"}

Exif = Literal["transpose", "ignore"]
"""transpose: images are turned upright, as PIL.ImageOps.exif_transpose does; ignore: pixels as they are stored."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the image upright."""
_EXIF_ERRORS = (
    OSError, ValueError, SyntaxError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError,
    struct.error,
)  # fmt: skip
"""What Pillow raises for EXIF data that are damaged."""
_EXIF_KEYS = frozenset(("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"))
"""Where Pillow keeps, in Image.info, what can name an orientation."""
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Beginnings of the parts of a PNG that can name an orientation; they may come after the pixels."""

_BITS_PER_SAMPLE = 258
"""Tag of a TIFF."""
_HEADER = 1 << 20
"""Bytes in which the header of any file ends."""


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
    exif: Exif = "transpose"
    bits: int = 8
    """Of each channel, 8 or 16; an image of another depth is an error."""

    @property
    def is_picture(self) -> bool:
        """Whether Pillow has a mode for these images; others are Bands."""
        return is_picture(self.channels, dtype_of(self.bits))


def read_image(path: Path, image_format: ImageFormat) -> Image.Image:
    """The image in the channels of the format, in its own size, turned as the format says: of 8-bit gray or RGB, and
    not of an array; see band_file for all others.

    Transparency is dropped, as by Pillow's convert("RGB"). Raises CorruptSample; DataError where mode or size are not
    those of the format, for more than 8 bits per channel, and for what is not a regular file.
    """
    with opened(path) as image:
        check_mode(path, image.mode, image_format)
        with named(f"image {path}"):
            image.load()
            upright = upright_image(image, image_format)
    check_size(path, upright.size, image_format)
    return upright


def encoded_image(path: Path, image_format: ImageFormat) -> tuple[bytes, tuple[int, int]]:
    """The image as the bytes of a file that every decoder reads the same, and its (width, height).

    These are the bytes of the file, without EXIF data, where it is a JPEG or PNG of mode L or RGB that need not be
    turned; damage after the header is then not found. Other images are decoded and become a PPM. Raises as
    `read_image`.
    """
    with regular(path) as file, named(f"image {path}"):
        data = file.read()
    with opened(path, io.BytesIO(data)) as image:
        check_mode(path, image.mode, image_format)
        with named(f"image {path}"):
            plain = _plain(image, data, image_format.exif)
        if plain is not None:
            check_size(path, image.size, image_format)
            return plain, image.size
        with named(f"image {path}"):
            image.load()
            upright, buffer = upright_image(image, image_format), io.BytesIO()
            check_size(path, upright.size, image_format)
            upright.save(buffer, "PPM")
    return buffer.getvalue(), upright.size


def open_image(file: IO[bytes]) -> Image.Image:
    """The image with its header read, of one of FORMATS. Raises whatever Pillow raises, and ValueError for too many
    pixels: Pillow raises only above twice its limit, and warns below that."""
    silence_pillow()
    image = Image.open(file, formats=tuple(FORMATS))
    check_pixels(image.width * image.height)
    return image


def check_pixels(pixels: int) -> None:
    """Raise ValueError for more pixels than Pillow takes."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise ValueError(f"its {pixels} pixels exceed Pillow's limit of {limit}")


@contextmanager
def named(what: str) -> Iterator[None]:
    """Make CorruptSample, which says that `what` does not decode, of everything raised but DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise CorruptSample(f"{what} does not decode: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is not a {_NAMES} file, or its header is damaged"
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


@contextmanager
def regular(path: Path) -> Iterator[BinaryIO]:
    """The open file. Raises DataError for what is not a regular file, CorruptSample for one that cannot be read."""
    with named(f"image {path}"):
        check_regular(path)
        file = path.open("rb")
    with file:
        yield file


@contextmanager
def opened(path: Path, data: BinaryIO | None = None, *, deep: bool = False) -> Iterator[Image.Image]:
    """The image with its header read, from the file or from its bytes. Raises DataError for one of more than 8 bits
    per channel, unless `deep`."""
    if data is None:
        with regular(path) as file, opened(path, file, deep=deep) as image:
            yield image
        return
    with named(f"image {path}"):
        try:
            image = open_image(data)
        except UnidentifiedImageError:
            data.seek(0)
            content = data.read(_HEADER)
            if not content:
                raise ValueError("the file is empty") from None
            if (jpeg.bits_per_channel(content) or 8) > 8:
                raise depth_error(path) from None
            raise
    with image:
        with named(f"image {path}"):
            if not deep and is_deep(image):
                raise depth_error(path)
        yield image


def upright_image(image: Image.Image, image_format: ImageFormat) -> Image.Image:
    """The loaded image in the channels of the format, turned as it says."""
    turn = turn_of(image, image_format.exif)
    image.info.pop("transparency", None)  # what cannot be kept: Pillow would warn, or raise where it is damaged
    converted = image.convert(MODE_OF_CHANNELS[image_format.channels])
    return converted if turn is None else converted.transpose(turn)


def turn_of(image: Image.Image, exif: Exif) -> Image.Transpose | None:
    """What turns a loaded image upright; Pillow has turned a TIFF by its own tag while it loaded it."""
    if exif == "ignore" or image.format == "TIFF" or _EXIF_KEYS.isdisjoint(image.info):
        return None
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return _TURNS.get(orientation)  # type: ignore[arg-type]  # of any type
    except _EXIF_ERRORS:  # of no account, as everywhere: the pixels are whole
        return None


def _plain(image: Image.Image, data: bytes, exif: Exif) -> bytes | None:
    """Bytes that every decoder reads as Pillow reads the file `data`, whose header `image` is; None: see PPM."""
    if image.mode not in CHANNELS_OF_MODE or "transparency" in image.info:
        return None
    if image.format in ("JPEG", "MPO"):
        return None if turn_of(image, exif) is not None else jpeg.without_exif(data)
    is_plain_png = image.format == "PNG" and not getattr(image, "is_animated", False)
    if not is_plain_png or _raw_modes(image) != {image.mode} or any(part in data for part in _PNG_ORIENTATION):
        return None
    return data


def _raw_modes(image: Image.Image) -> set[str]:
    """How the file stores its pixels, of a PNG whose pixels are not loaded yet."""
    tiles = getattr(image, "tile", ())
    return {tile.args if isinstance(tile.args, str) else str(tile.args[0]) for tile in tiles if tile.args}


def is_deep(image: Image.Image) -> bool:
    """Whether it has more than 8 bits per channel, of which Pillow drops some without a word where there is color."""
    if image.mode.startswith(("I", "F")):
        return True
    if image.format == "PNG":
        return any(";16" in mode for mode in _raw_modes(image))
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (8,)) if image.format == "TIFF" else ()  # type: ignore[attr-defined]
    return any(count > 8 for count in (bits if isinstance(bits, tuple) else (bits,)))


def check_mode(path: Path, mode: str, image_format: ImageFormat) -> None:
    if image_format.convert:
        return
    if mode not in CHANNELS_OF_MODE:
        raise mode_error(path, mode)
    if CHANNELS_OF_MODE[mode] != image_format.channels:
        raise DataError(
            f"image {path} has mode {mode} but {image_format.reference} has {image_format.channels} channel(s): "
            f"set data.channels=3 to convert all to RGB, or data.channels=1 to gray"
        )


def check_size(path: Path, size: tuple[int, int], image_format: ImageFormat) -> None:
    expected = (image_format.image_size, image_format.image_size)
    if not image_format.resize and size != expected:
        raise DataError(
            f"images of mixed sizes: {image_format.reference} is {expected[0]}x{expected[1]}, "
            f"{path} is {size[0]}x{size[1]}: set data.image_size to resize all"
        )


def mode_error(path: Path, mode: str) -> DataError:
    """For an image of a mode that is only read where data.channels is set."""
    return DataError(
        f"image {path} has mode {mode}, which is neither gray nor RGB: data.channels=3 converts all images to RGB"
    )


def depth_error(path: Path) -> DataError:
    return DataError(f"image {path} has more than 8 bits per channel: convert it to 8 bits first")
