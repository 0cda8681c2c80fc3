"""Images from files, folders of any depth or .beton files, converted to the size and channels of a model."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..data import BetonSource, Source, dtype_of, is_picture, open_beton, pixel_dtype
from ..data.sources.folder import FolderSource
from ..data.sources.image_file import SUFFIXES, Exif, ImageFormat
from ..data.sources.listing import check_regular, list_images
from ..errors import DataError

AHEAD = 2
"""Batches that are decoded in advance while the model computes one."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size and number of channels, ordered by path (those of a .beton: in its own order)."""

    source: Source
    paths: tuple[str, ...]
    """Of each image; FILE.beton#INDEX for images of a .beton."""
    labels: tuple[int, ...] | None
    """Index of each image's class among the model's; None unless every image lies in a folder (or belongs to a class
    of the .beton) that has the name of one of them."""
    notes: tuple[str, ...]
    """Lines about what was left out of folders: what is passed over everywhere, files that do not end like images."""
    unknown_classes: tuple[str, ...] = ()
    """Why there are no labels: classes of the images that the model does not have, where it has others of them."""


@dataclass(frozen=True)
class DecodedBatch:
    """Consecutive images of an ImageSet, without those that do not decode."""

    images: Tensor
    """uint8 or uint16 [n, C, S, S]."""
    indices: tuple[int, ...]
    """Their positions in the ImageSet."""
    problems: tuple[str, ...]
    """A line for each image of this batch that does not decode."""


def open_images(
    paths: Sequence[Path],
    shape: tuple[int, int, int],
    classes: Sequence[str],
    *,
    exif: Exif = "transpose",
    bits: int = 8,
) -> ImageSet:
    """The images in `paths`: image files, folders, or one .beton file. Nothing is decoded yet.

    shape: (C, S, S) to which every image is converted, as training does with an image folder: to gray or RGB, shorter
    side to S px, central square. classes: the model's, for the labels. exif: data.exif of the model's run. bits:
    of each channel, 8 or 16; other images are refused where they are decoded. Raises DataError.
    """
    betons = [path for path in paths if path.suffix == ".beton"]
    if betons:
        if not is_picture(shape[0], dtype_of(bits)):
            raise DataError(
                f"{betons[0]}: .beton files hold 8-bit images of 1 or 3 channels, but the model is for {shape[0]} of "
                f"{bits} bits: pass image files"
            )
        if len(paths) > 1:
            raise DataError(f"{betons[0]}: a .beton file stands alone; pass the other images in another call")
        return _open_beton(betons[0], shape, classes, exif)
    files: set[Path] = set()
    notes: list[str] = []
    for path in paths:
        if path.is_dir():
            listed, lines = list_images(path, SUFFIXES)
            if not listed:
                raise DataError(f"{path} holds no images ({', '.join(SUFFIXES)}), at any depth")
            files.update(listed)
            notes += lines
        elif path.exists():
            check_regular(path)
            files.add(path)
        else:
            raise DataError(f"{path} does not exist")
    image_paths = sorted(files)
    if not image_paths:
        raise DataError("no images given: name image files, folders or a .beton file")
    image_format = ImageFormat(
        shape[0], shape[1], convert=True, resize=True, reference=image_paths[0], exif=exif, bits=bits
    )
    source = FolderSource(image_paths, torch.zeros(len(image_paths), dtype=torch.int64), (), image_format)
    names = [path.parent.name for path in image_paths]
    unknown, given = _unknown(names, classes), tuple(map(str, image_paths))
    return ImageSet(source, given, _labels(names, classes), tuple(notes), unknown)


def _open_beton(path: Path, shape: tuple[int, int, int], classes: Sequence[str], exif: Exif) -> ImageSet:
    beton = open_beton(path, image_size=shape[1], exif=exif)
    if beton.channels != shape[0]:
        beton = BetonSource(path, beton.columns, beton.rows, beton.labels, beton.classes, shape[0], shape[1])
    positions = tuple(f"{path}#{i}" for i in range(len(beton)))
    if not beton.classes:  # made of images without labels
        return ImageSet(beton, positions, None, ())
    names = [beton.classes[label] for label in beton.labels.tolist()]
    return ImageSet(beton, positions, _labels(names, classes), (), _unknown(names, classes))


def _labels(names: Sequence[str], classes: Sequence[str]) -> tuple[int, ...] | None:
    index = {name: label for label, name in enumerate(classes)}
    return tuple(index[name] for name in names) if set(names) <= index.keys() else None


def _unknown(names: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    """The names that are no classes where others are; folders of which none is one are not meant as classes."""
    unknown = set(names) - set(classes)
    return tuple(sorted(unknown)) if unknown < set(names) else ()


def decode(
    source: Source, batch_size: int, *, skip_corrupt: bool = False, workers: int | None = None
) -> Iterator[DecodedBatch]:
    """All images of a source, up to `batch_size` at a time, decoded in advance by `workers` threads (None: one per
    processor).

    Raises CorruptSample and DataError naming the image; with skip_corrupt they become `problems` instead.
    """
    n = len(source)
    starts = iter(range(0, n, batch_size))
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:

        def submit(start: int) -> tuple[int, list[Future[Tensor | DataError]]]:
            return start, [pool.submit(_read, source, i) for i in range(start, min(start + batch_size, n))]

        queue = deque(submit(start) for start in islice(starts, AHEAD))
        try:
            while queue:
                start, futures = queue.popleft()
                queue.extend(submit(next_start) for next_start in islice(starts, 1))
                yield _batch(source, start, [future.result() for future in futures], skip_corrupt=skip_corrupt)
        finally:
            pool.shutdown(cancel_futures=True)


def _read(source: Source, i: int) -> Tensor | DataError:
    try:
        return source.read(i)
    except DataError as error:
        return error


def _batch(source: Source, start: int, results: list[Tensor | DataError], *, skip_corrupt: bool) -> DecodedBatch:
    problems = [result for result in results if isinstance(result, DataError)]
    if problems and not skip_corrupt:
        raise type(problems[0])(f"{problems[0]}; --skip-corrupt leaves such images out") from problems[0]
    decoded = [(start + k, result) for k, result in enumerate(results) if isinstance(result, Tensor)]
    none = torch.empty(0, source.channels, source.image_size, source.image_size, dtype=pixel_dtype(source))
    images = torch.stack([image for _, image in decoded]) if decoded else none
    return DecodedBatch(images, tuple(i for i, _ in decoded), tuple(map(str, problems)))
