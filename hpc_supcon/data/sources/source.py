"""Sources: images and labels, independent of their format on disk, and the statistics of their pixels."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...errors import CorruptSample, DataError
from ...seeding import stream

Pixels = npt.NDArray[np.uint8]

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in the luminance (ITU-R BT.601, with the digits that torchvision uses)."""


class Source(Protocol):
    """Labeled square images, all of one size and one number of channels."""

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
        """1 (gray) or 3 (RGB)."""
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
        """Image i as uint8 [C, H, W]. Raises CorruptSample where the format can be corrupt."""
        ...

    def pil_image(self, i: int) -> Image.Image:
        """Image i in the source's channels (mode L or RGB) but in the size it is stored in. Raises as `read`."""
        ...

    def stack(self) -> Tensor:
        """All images as uint8 [N, C, H, W]; not to be written to. Raises as `read` does."""
        ...

    def subset(self, indices: Tensor | Sequence[int]) -> Source:
        """The source of these images, in this order."""
        ...


class ArraySource:
    """A source that is already in memory."""

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str], paths: Sequence[Path] | None = None
    ) -> None:
        """images uint8 [N, C, S, S] with C 1 or 3; labels int64 [N] in 0..len(classes)-1; paths: see Source."""
        assert images.dtype == torch.uint8, images.dtype
        assert images.ndim == 4, images.shape
        assert images.shape[2] == images.shape[3], images.shape
        assert labels.dtype == torch.int64, labels.dtype
        assert labels.shape == images.shape[:1], labels.shape
        assert paths is None or len(paths) == len(labels)
        self._images = images
        self.labels = labels
        self.classes = tuple(classes)
        self.channels = int(images.shape[1])
        self.image_size = int(images.shape[2])
        self.paths = None if paths is None else tuple(paths)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> Tensor:
        return self._images[i]

    def pil_image(self, i: int) -> Image.Image:
        pixels = self._images[i].permute(1, 2, 0).contiguous().numpy()
        return Image.fromarray(pixels[:, :, 0] if self.channels == 1 else pixels)

    def stack(self) -> Tensor:
        return self._images

    def subset(self, indices: Tensor | Sequence[int]) -> ArraySource:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        paths = None if self.paths is None else [self.paths[i] for i in rows.tolist()]
        return ArraySource(self._images[rows], self.labels[rows], self.classes, paths)


def stack_images(read: Callable[[int], Pixels], n: int, shape: tuple[int, int, int]) -> Tensor:
    """uint8 [n, *shape]: read(0) ... read(n - 1), read by one thread for each processor of this process.

    Raises what `read` raises, for the first image that fails.
    """
    images = np.empty((n, *shape), dtype=np.uint8)
    failed = threading.Event()

    def decode(start: int) -> None:
        for i in range(start, min(start + 256, n)):
            if failed.is_set():
                return
            try:
                images[i] = read(i)
            except DataError:
                failed.set()
                raise

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(decode, range(0, n, 256)):
            pass
    return torch.from_numpy(images)


def channels_first(image: Image.Image) -> Pixels:
    """uint8 [C, H, W] of an image of mode L or RGB."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


_ORDINARY = 4
"""Width / height, or height / width, up to which an image is resized as a whole."""


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
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
    """uint8 [N, C, H, H] -> uint8 [N, channels, image_size, image_size]; None leaves as it is.

    channels: 1 (the luminance) or 3 (gray repeated). Resized bilinearly with antialiasing, rounded to nearest.
    """
    if channels is not None and channels != images.shape[1]:
        images = images.expand(-1, 3, -1, -1) if channels == 3 else _chunked(_to_gray, images)
    if image_size is not None and image_size != images.shape[-1]:
        size = (image_size, image_size)
        images = _chunked(lambda x: F.interpolate(x, size=size, mode="bilinear", antialias=True), images)
    return images.contiguous()


def _to_gray(images: Tensor) -> Tensor:
    return torch.einsum("nchw,c->nhw", images, torch.tensor(LUMA)).unsqueeze(1)


def _chunked(function: Callable[[Tensor], Tensor], images: Tensor, size: int = 4096) -> Tensor:
    """uint8 -> float -> function -> uint8, chunk by chunk: floats of the whole set would be four times as big."""
    return torch.cat([function(x.float()).round_().clamp_(0, 255).to(torch.uint8) for x in images.split(size)])


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation per channel, in units of 0..1, float32 [C] each.

    images: uint8 [N, C, H, W], any device. Exact: pixel values are counted in integers, the moments computed
    in float64. A constant channel gets standard deviation 1, so that it can be divided by.
    """
    assert images.dtype == torch.uint8, images.dtype
    assert images.ndim == 4, images.shape
    assert images.numel() > 0
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for chunk in images.split(8192):
        for c in range(images.shape[1]):
            counts[c] += torch.bincount(chunk[:, c].flatten(), minlength=256).cpu()
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(dim=1).sqrt()
    std[(counts > 0).sum(dim=1) == 1] = 1.0
    return mean.float(), std.float()


NORMALIZATION_SAMPLE = 10_000
"""Images from which the statistics are estimated where a set is not in memory."""


def normalization_of(train: Source) -> dict[str, list[float]]:
    """Mean and standard deviation per channel of the training images, as plain numbers."""
    if isinstance(train, ArraySource):
        mean, std = channel_statistics(train.stack())
    else:
        n = min(len(train), NORMALIZATION_SAMPLE)
        chosen = np.sort(np.random.default_rng(stream(0, "statistics")).choice(len(train), n, replace=False)).tolist()
        mean, std = channel_statistics(torch.stack(list(_valid_images(train, chosen))))
    return {"mean": mean.tolist(), "std": std.tolist()}


def _valid_images(source: Source, indices: list[int]) -> Iterator[Tensor]:
    """Those that decode; the loader reports or replaces the others."""
    for i in indices:
        with suppress(CorruptSample):
            yield source.read(i)
