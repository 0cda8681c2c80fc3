"""Images from anywhere, in the form that a model was trained on: files, folders of any depth, .beton files."""

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

from ..data import BetonSource, Source, open_beton
from ..data.sources.folder import IGNORED, SUFFIXES, FolderSource, ImageFormat
from ..errors import DataError

AHEAD = 2
"""Batches that are decoded while the model works on one."""


@dataclass(frozen=True)
class Pictures:
    """Images of one form, in the order of their sorted paths (a .beton: in its own order)."""

    source: Source
    paths: tuple[str, ...]
    """One for each image; FILE.beton#INDEX for those of a .beton."""
    labels: tuple[int, ...] | None
    """Index into the model's classes of each image; None unless every image is in a folder (or a class of the
    .beton) called like one of them."""
    ignored: int
    """Files in folders that are not called like images."""


@dataclass(frozen=True)
class Decoded:
    """Some images, one after the other in the order of `Pictures`."""

    images: Tensor
    """uint8 [n, C, S, S]."""
    rows: tuple[int, ...]
    """Which of the pictures they are."""
    problems: tuple[str, ...]
    """A line for each picture between them that cannot be used."""


def open_pictures(paths: Sequence[Path], shape: tuple[int, int, int], classes: Sequence[str]) -> Pictures:
    """What `paths` name: image files, folders, or one .beton file. Nothing is decoded yet.

    shape: (channels, S, S) that every image is made into, as training does with an image folder: to gray or RGB,
    shorter side to S px, the central square. classes: the model's, for the labels. Raises DataError.
    """
    betons = [path for path in paths if path.suffix == ".beton"]
    if betons:
        if len(paths) > 1:
            raise DataError(f"{betons[0]}: a .beton file stands alone; give the other images to another call")
        return _open_beton(betons[0], shape, classes)
    files: set[Path] = set()
    ignored = 0
    for path in paths:
        if path.is_dir():
            found, others = _list_folder(path)
            if not found:
                raise DataError(f"{path} holds no images ({', '.join(SUFFIXES)}), however deep")
            files.update(found)
            ignored += others
        elif path.is_file():
            files.add(path)
        else:
            raise DataError(f"{path} does not exist")
    images = sorted(files)
    if not images:
        raise DataError("no images given: name image files, folders or a .beton file")
    image_format = ImageFormat(shape[0], shape[1], convert=True, resize=True, reference=images[0])
    source = FolderSource(images, torch.zeros(len(images), dtype=torch.int64), (), image_format)
    names = [path.parent.name for path in images]
    return Pictures(source, tuple(map(str, images)), _labels(names, classes), ignored)


def _open_beton(path: Path, shape: tuple[int, int, int], classes: Sequence[str]) -> Pictures:
    beton = open_beton(path, image_size=shape[1])
    if beton.channels != shape[0]:
        beton = BetonSource(path, beton.columns, beton.rows, beton.labels, beton.classes, shape[0], shape[1])
    names = [beton.classes[label] for label in beton.labels.tolist()]
    return Pictures(beton, tuple(f"{path}#{i}" for i in range(len(beton))), _labels(names, classes), 0)


def _labels(names: Sequence[str], classes: Sequence[str]) -> tuple[int, ...] | None:
    index = {name: label for label, name in enumerate(classes)}
    return tuple(index[name] for name in names) if set(names) <= index.keys() else None


def _list_folder(root: Path) -> tuple[list[Path], int]:
    """(image files, number of other files) under a folder, links followed, each folder once."""
    found: list[Path] = []
    others, seen = 0, set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up would be walked for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [name for name in files if not name.startswith(".") and name.lower() not in IGNORED]
        images = [name for name in names if name.lower().endswith(SUFFIXES)]
        found += [Path(folder, name) for name in images]
        others += len(names) - len(images)
    return found, others


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error


def decode(
    source: Source, batch_size: int, *, skip_corrupt: bool = False, workers: int | None = None
) -> Iterator[Decoded]:
    """All images of a source, up to `batch_size` at a time, decoded ahead by `workers` threads (None: one per
    processor).

    Raises CorruptSample and DataError naming the image; with skip_corrupt they become `problems`.
    """
    n = len(source)
    starts = iter(range(0, n, batch_size))
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:

        def begin(start: int) -> tuple[int, list[Future[Tensor | DataError]]]:
            return start, [pool.submit(_read, source, i) for i in range(start, min(start + batch_size, n))]

        waiting = deque(begin(start) for start in islice(starts, AHEAD))
        try:
            while waiting:
                start, begun = waiting.popleft()
                waiting.extend(begin(next_start) for next_start in islice(starts, 1))
                yield _gathered(source, start, [future.result() for future in begun], skip_corrupt=skip_corrupt)
        finally:
            pool.shutdown(cancel_futures=True)


def _read(source: Source, i: int) -> Tensor | DataError:
    try:
        return source.read(i)
    except DataError as error:
        return error


def _gathered(source: Source, start: int, results: list[Tensor | DataError], *, skip_corrupt: bool) -> Decoded:
    problems = [result for result in results if isinstance(result, DataError)]
    if problems and not skip_corrupt:
        raise type(problems[0])(f"{problems[0]}; --skip-corrupt leaves such images out") from problems[0]
    sound = [(start + k, result) for k, result in enumerate(results) if isinstance(result, Tensor)]
    shape = (source.channels, source.image_size, source.image_size)
    images = torch.stack([image for _, image in sound]) if sound else torch.empty(0, *shape, dtype=torch.uint8)
    return Decoded(images, tuple(i for i, _ in sound), tuple(map(str, problems)))
