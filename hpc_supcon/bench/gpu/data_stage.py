"""Stage data: views/s of the augmentation alone, and images/s of every loader with two views on the device."""

from __future__ import annotations

import os
import tempfile
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...data import ArraySource, Source, Views, convert_splits, open_beton, open_source
from ..common import is_installed, seconds_of
from ..loader import MEAN, STD, make_large_set, our_batches, rate
from .work import Work

POLICIES = ("flip_crop", "simaugment")
CLASSES = ("a", "b")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    images: int
    """Of the set in memory, 32 px."""
    batches: tuple[int, ...]
    """Images in a batch of the set in memory."""
    files: int
    """JPEGs of 32 px, where no --data is given, and of `large` px."""
    large: int
    """px; views are 7/8 of it."""
    batch: int
    """Images in a batch of files."""
    workers: int
    seconds: float


def run(work: Work) -> None:
    size = Size(50_000, (512, 8192), 4096, 256, 512, min(14, max(1, (os.cpu_count() or 2) - 2)), 2.0)
    if work.is_small:
        size = Size(64, (16,), 16, 32, 4, 1, 0.05)
    with work.measuring("views"):
        _views(work, size)
    with work.measuring("resident"):
        images = torch.randint(0, 256, (size.images, 3, 32, 32), dtype=torch.uint8)
        source = ArraySource(images, torch.arange(size.images) % 2, CLASSES)
        for policy in POLICIES:
            for batch in size.batches:
                _measure(work, "32 px in memory", "resident", source, 32, batch, 8, policy, size.seconds)
    with tempfile.TemporaryDirectory() as scratch:
        _files(work, size, Path(scratch))


def _views(work: Work, size: Size) -> None:
    """The random views of images that are on the device."""
    for side, count in ((32, size.batches[-1]), (224, max(1, size.batch // 2))):
        images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=work.device)
        for policy in POLICIES:
            views = Views(2, side, mean=MEAN, std=STD, policy=policy, channels_last=True).to(work.device)
            views(images)
            seconds = seconds_of(partial(views, images), work.device)
            work.record.row(
                "views",
                policy=policy,
                image_size=side,
                images=count,
                views_per_s=2 * count / seconds,
                seconds=seconds,
            )


def _files(work: Work, size: Size, scratch: Path) -> None:
    """The loaders that read files, on small and on large images."""
    large_batch = max(1, size.batch // 4)
    for name, module in (("torch", "torch"), ("dali", "nvidia.dali"), ("ffcv", "ffcv")):
        if not is_installed(module):  # said by stage machine
            work.record.skip(name, f"{module} is not installed")
            continue
        kinds = [("small JPEG", 0, size.batch), (f"{size.large}-px JPEG", size.large, large_batch)]
        for label, side, batch in kinds[:1] if work.is_small and name != "torch" else kinds:
            if not work.has_time(f"{name}, {label}", 0 if work.is_small else 6):
                continue
            with work.measuring(f"{name}, {label}"):
                folder = work.data if not side and work.data else scratch / label
                if not folder.exists():
                    make_large_set(folder, max(batch, size.files // (8 if side else 1)), side or 32)
                view = side * 7 // 8
                source = _source(name, folder, scratch / f"{label}.beton", view)
                used = min(batch, len(source))
                _measure(
                    work, label, name, source, view or source.image_size, used, size.workers, "simaugment",
                    size.seconds, crop=bool(side),
                )  # fmt: skip


def _source(name: str, folder: Path, beton: Path, size: int) -> Source:
    """What the loader `name` reads: image files, or for ffcv the same as a .beton file, which is written here.

    size: side of the images in px; 0: that of the files.
    """
    splits = open_source("image_folder", folder, image_size=size or None)
    if name != "ffcv":
        return splits.train
    convert_splits("image_folder", splits, beton)
    return open_beton(beton.with_name(f"{beton.stem}.train.beton"), image_size=size or None)


def _measure(
    work: Work, label: str, name: str, source: Source, side: int, batch: int, workers: int, policy: str,
    seconds: float, *, crop: bool = False,
) -> None:  # fmt: skip
    made = our_batches(name, source, side, batch, workers, work.kind, policy, crop=crop)
    with closing(made) as batches:
        images_per_s, cpu = rate(batches, seconds, workers, work.kind)
    print(f"{name}, {label}, batch {batch}, {policy}: {images_per_s:,.0f} images/s", flush=True)
    work.record.row(
        "loaders", name=name, data=label, policy=policy, image_size=side, batch_size=batch, workers=workers,
        images_per_s=images_per_s, cpu_ms_per_image=1e3 * cpu,
    )  # fmt: skip
