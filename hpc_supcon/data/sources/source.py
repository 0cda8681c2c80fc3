"""Sources: images and labels, independent of their format on disk, and the statistics of their pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...errors import CorruptSample, DataError
from ...seeding import stream
from ..levels import PICTURE_CHANNELS, bits_of, full_scale, is_picture, rounded_
from .bands import Bands, Picture, Pixels

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in the luminance (ITU-R BT.601, with the digits that torchvision uses)."""


class Source(Protocol):
    """Labeled square images, all of one size and one number of channels.

    Their levels are uint8, or those of the attribute `dtype` of a source that has it (see `pixel_dtype`).
    """

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; a label is an index into them."""
        ...

    @property
    def channels(self) -> int:
        """1 (gray), 3 (RGB) or another number, up to 64."""
        ...

    @property
    def image_size(self) -> int:
        """Height and width in pixels, after any resizing."""
        ...

    @property
    def paths(self) -> tuple[Path, ...] | None:
        """The file of each image; None where images have no files of their own."""
        ...

    def __len__(self) -> int: ...

    def read(self, i: int) -> Tensor:
        """Image i as uint8 or uint16 [C, H, W]. Raises CorruptSample where the format can be corrupt."""
        ...

    def pil_image(self, i: int) -> Picture:
        """Image i in the source's channels but in the size it is stored in: of mode L or RGB, or Bands where it has
        another number of channels or 16 bits. Raises as `read`."""
        ...

    def stack(self) -> Tensor:
        """All images as uint8 or uint16 [N, C, H, W]; not to be written to. Raises as `read` does."""
        ...

    def subset(self, indices: Tensor | Sequence[int]) -> Source:
        """The source of these images, in this order."""
        ...


def pixel_dtype(source: Source) -> torch.dtype:
    """torch.uint16 of a source that says so in its attribute `dtype`, else torch.uint8."""
    return getattr(source, "dtype", torch.uint8)


class ArraySource:
    """A source that is already in memory."""

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str], paths: Sequence[Path] | None = None
    ) -> None:
        """images uint8 or uint16 [N, C, S, S]; labels int64 [N] in 0..len(classes)-1; paths: see Source."""
        assert images.dtype in (torch.uint8, torch.uint16), images.dtype
        assert images.ndim == 4, images.shape
        assert images.shape[2] == images.shape[3], images.shape
        assert labels.dtype == torch.int64, labels.dtype
        assert labels.shape == images.shape[:1], labels.shape
        assert paths is None or len(paths) == len(labels)
        self._images = images
        self.labels = labels
        self.classes = tuple(classes)
        self.channels, self.dtype = int(images.shape[1]), images.dtype
        self.image_size = int(images.shape[2])
        self.paths = None if paths is None else tuple(paths)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> Tensor:
        return self._images[i]

    def pil_image(self, i: int) -> Picture:
        if not is_picture(self.channels, self.dtype):
            return Bands(self._images[i].numpy())
        pixels = self._images[i].permute(1, 2, 0).contiguous().numpy()
        return Image.fromarray(pixels[:, :, 0] if self.channels == 1 else pixels)

    def stack(self) -> Tensor:
        return self._images

    def subset(self, indices: Tensor | Sequence[int]) -> ArraySource:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        paths = None if self.paths is None else [self.paths[i] for i in rows.tolist()]
        return ArraySource(self._images[rows], self.labels[rows], self.classes, paths)


def channels_first(image: Picture) -> Pixels:
    """uint8 [C, H, W] of an image of mode L or RGB; the pixels of Bands."""
    if isinstance(image, Bands):
        return image.pixels
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


_ORDINARY = 4
"""Width / height, or height / width, up to which an image is resized as a whole."""


@overload
def resize_and_crop(image: Image.Image, size: int) -> Image.Image: ...


@overload
def resize_and_crop(image: Picture, size: int) -> Picture: ...


def resize_and_crop(image: Picture, size: int) -> Picture:
    """The image with its shorter side resized to `size` pixels, antialiased, and cropped to the central square.

    Of an image that is long and thin only that square is resized: whole, it could take more memory than there is.
    """
    width, height = image.size
    if (width, height) == (size, size):
        return image
    short = min(width, height)
    wide, tall = size * width // short, size * height // short
    left, top = (wide - size) // 2, (tall - size) // 2
    if max(wide, tall) <= _ORDINARY * size:  # the same as below, but for a box whose sides are rounded to 24 bits
        image = image.resize((wide, tall), Image.Resampling.BILINEAR)
        return image.crop((left, top, left + size, top + size))
    x, y = width / wide, height / tall
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def fit_images(images: Tensor, *, image_size: int | None, channels: int | None) -> Tensor:
    """uint8 or uint16 [N, C, H, H] -> the same dtype [N, channels, image_size, image_size]; None leaves as it is.

    channels: 1 (the luminance) or 3 (gray repeated), of images that have 3 or 1; any other number must be the images'
    own, else DataError. Resized bilinearly with antialiasing, rounded to nearest.
    """
    if channels is not None and channels != images.shape[1]:
        if not {channels, images.shape[1]} <= set(PICTURE_CHANNELS):
            raise channels_error("the images have", images.shape[1], channels)
        images = images.expand(-1, 3, -1, -1) if channels == 3 else _chunked(_to_gray, images)
    if image_size is not None and image_size != images.shape[-1]:
        size = (image_size, image_size)
        images = _chunked(lambda x: F.interpolate(x, size=size, mode="bilinear", antialias=True), images)
    return images.contiguous()


def channels_error(what: str, stored: int, wanted: int) -> DataError:
    """For images that have another number of channels than data.channels, to which they cannot be converted. what:
    begins the line, such as "image x.npy has"."""
    return DataError(
        f"{what} {stored} channel{'s' * (stored != 1)}, but data.channels={wanted}: only gray and RGB are converted, "
        f"to each other; use data.channels={stored}, or images with {wanted} channel{'s' * (wanted != 1)}"
    )


def _to_gray(images: Tensor) -> Tensor:
    return torch.einsum("nchw,c->nhw", images, torch.tensor(LUMA)).unsqueeze(1)


def _chunked(function: Callable[[Tensor], Tensor], images: Tensor, size: int = 4096) -> Tensor:
    """Levels -> float -> function -> levels, chunk by chunk: floats of the whole set would be far larger."""
    return torch.cat([rounded_(function(x.float()), images.dtype) for x in images.split(size)])


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation per channel, in units of 0..1 of full scale, float32 [C] each.

    images: uint8 or uint16 [N, C, H, W], any device. Exact: pixel values are counted in integers, the moments
    computed in float64. A constant channel gets standard deviation 1, so that it can be divided by.
    """
    full = full_scale(images.dtype)
    assert images.ndim == 4, images.shape
    assert images.numel() > 0
    counts = torch.zeros(images.shape[1], full + 1, dtype=torch.int64)
    for chunk in images.split(8192):
        for c in range(images.shape[1]):
            levels = chunk[:, c].flatten()
            levels = levels if levels.dtype == torch.uint8 else levels.int()  # what bincount takes
            counts[c] += torch.bincount(levels, minlength=full + 1).cpu()
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    values = torch.arange(full + 1, dtype=torch.float64) / full
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(dim=1).sqrt()
    std[(counts > 0).sum(dim=1) == 1] = 1.0
    return mean.float(), std.float()


NORMALIZATION_SAMPLE = 10_000
"""Images from which the statistics are estimated where a set is not in memory."""


def normalization_of(train: Source) -> dict[str, Any]:
    """Mean and standard deviation per channel of the training images, as plain numbers: keyword arguments of `Views`
    and `EvalTransform`. Of 16-bit images also their `bits`, which are left out where they are 8."""
    if isinstance(train, ArraySource):
        mean, std = channel_statistics(train.stack())
    else:
        n = min(len(train), NORMALIZATION_SAMPLE)
        chosen = np.sort(np.random.default_rng(stream(0, "statistics")).choice(len(train), n, replace=False)).tolist()
        mean, std = channel_statistics(torch.stack(list(_valid_images(train, chosen))))
    bits = bits_of(pixel_dtype(train))
    return {"mean": mean.tolist(), "std": std.tolist(), **({} if bits == 8 else {"bits": bits})}


def _valid_images(source: Source, indices: list[int]) -> Iterator[Tensor]:
    """Those that decode; the loader reports or replaces the others."""
    for i in indices:
        with suppress(CorruptSample):
            yield source.read(i)
