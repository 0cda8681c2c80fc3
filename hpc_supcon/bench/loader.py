"""Images/s of every loader, each as two augmented, normalized views on the device, compared with torchvision.

    hpc-supcon bench loader --data /data/cifar10 --batch-size 512 --workers 2

The baseline is what most code does: torchvision's ImageFolder with per-sample transforms applied twice, in a
DataLoader. All contenders read the same files with the same batch sizes and workers, in turns in one process.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from datetime import date
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from ..allocator import keep_freed_memory
from ..config.schema.data import DataConfig
from ..data import (
    ArraySource,
    CropOptions,
    LoaderOptions,
    Source,
    TrainOrder,
    Views,
    build_loader,
    convert_splits,
    open_beton,
    open_source,
)
from ..data.loaders import OnCorrupt
from ..errors import ConfigError, MissingExtra
from .common import machine
from .loader_plot import LoaderRow, plot

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGE, LARGEST_BATCH = 224, 512
"""For large images: side of the views in px, and images in the largest batch. Small images keep their size."""
CONTENDERS = ("torchvision", "resident", "torch", "ffcv", "ffcv-decode-twice", "dali")

Batches = Generator[Tensor, None, None]
"""float32 [B, 2, 3, S, S]"""
_TORCHVISION_COLOR = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(0.2)]


def make_large_set(folder: Path, images: int = 1024, side: int = 256) -> Path:
    """Write an image folder of random JPEGs of side x side px, without a download; returns `folder`.

    They have 3.3 bits per pixel, as photographs of this size at quality 90 to 95, so that decoding costs the same.
    """
    rng = np.random.default_rng(0)
    for i in range(images):
        coarse = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 8, (side, side, 3))
        pixels = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
        for split in ("train", "test") if i < 8 else ("train",):
            target = folder / split / f"class{i % 4}"
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target / f"{i}.jpg", quality=90)
    return folder


def torchvision_batches(folder: Path, size: int, batch_size: int, workers: int, device: str, policy: str) -> Batches:
    """Two views per image by per-sample transforms in DataLoader workers; endless."""
    one = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            *(_TORCHVISION_COLOR if policy == "simaugment" else []),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    data = datasets.ImageFolder(str(folder / "train"), partial(_twice, one))
    loader = torch.utils.data.DataLoader(
        data, batch_size, shuffle=True, num_workers=workers, drop_last=True, pin_memory=device != "cpu",
        persistent_workers=True,
    )  # fmt: skip
    for _ in count():
        for views, _ in loader:
            yield views.to(device, non_blocking=True)


def _twice(transform: Callable[[Any], Tensor], image: Any) -> Tensor:
    return torch.stack([transform(image), transform(image)])


def our_batches(
    name: str, source: Source, size: int, batch_size: int, workers: int, device: str, policy: str, *, crop: bool,
    on_corrupt: OnCorrupt = "fail",
) -> Batches:  # fmt: skip
    """Two views per image by one of our loaders; endless. `crop`: the loader crops while decoding."""
    loader_name, _, twice = name.partition("-")
    views_per_decode = 1 if twice else 2
    crops = CropOptions(views_per_decode, size) if crop else None
    options = LoaderOptions(workers=workers, on_corrupt=on_corrupt, crop=crops)
    mean, std = MEAN[: source.channels], STD[: source.channels]
    views = Views(views_per_decode, size, mean=mean, std=std, policy=policy, channels_last=True).to(device)
    order = TrainOrder(len(source), batch_size)
    loader = build_loader(loader_name, source, order, seed=0, rank=0, world_size=1, device=device, options=options)
    with closing(loader):
        for epoch in count():
            batches = loader.epoch(epoch)
            if twice:
                for first, second in zip(batches, batches, strict=False):
                    both = views(first.images), views(second.images)
                    yield both[0]  # concatenating them would be one more copy
            else:
                yield from (views(batch.images) for batch in batches)


def rate(batches: Batches, seconds: float, workers: int, device: str) -> tuple[float, float]:
    """(images/s, CPU seconds per image), after one batch of each worker as warm-up.

    One batch of each worker at a time, because workers that started together deliver together.
    """
    for _ in range(workers):
        next(batches)
    busy, images, start = cpu_seconds(), 0, time.perf_counter()
    while not images or time.perf_counter() - start < seconds:
        images += sum(len(next(batches)) for _ in range(workers))
        if device != "cpu":
            torch.cuda.synchronize()
    return images / (time.perf_counter() - start), (cpu_seconds() - busy) / images


def cpu_seconds() -> float:
    """User and system time so far of this process and all its descendants."""
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # processes come and go
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(ticks[pid] for pid in mine) / os.sysconf("SC_CLK_TCK")


def measure(
    data: Path | None,
    settings: DataConfig,
    batch_sizes: Sequence[int],
    workers: Sequence[int],
    names: Sequence[str],
    device: str,
    policy: str,
    seconds: float,
    rounds: int,
    tag: str,
    out: Path,
) -> None:
    """Run, print, and write out/DATE-loader-DEVICE[TAG].json and .png. Raises ConfigError, DataError.

    data: an image folder of small images (None: large ones only), read with the image_size, channels, exif and
    on_corrupt of `settings`, which change nothing for torchvision. A contender whose package is missing is skipped,
    with a message.
    """
    if policy not in ("flip_crop", "simaugment"):
        raise ConfigError(f"the comparison knows the policies flip_crop and simaugment, not {policy}")
    if unknown := set(names) - set(CONTENDERS):
        raise ConfigError(f"unknown contenders {', '.join(sorted(unknown))}; known: {', '.join(CONTENDERS)}")
    about = machine(device)
    print(f"{about['device']}, {about['threads']} threads, {policy}")
    if device == "cpu":  # as in training
        keep_freed_memory()
    results: list[LoaderRow] = []
    with tempfile.TemporaryDirectory() as scratch:
        sets = [("256-px JPEG", make_large_set(Path(scratch) / "large"), LARGE)]
        if data is not None:
            sets.insert(0, (data.name, data, 0))
        for label, folder, size in sets:
            sources = _sources(folder, Path(scratch) / f"{label}.beton", size, settings)
            for batch_size, n_workers in product(batch_sizes, workers):
                if batch_size <= min(len(sources["torch"]), LARGEST_BATCH if size else batch_size):
                    in_turns = partial(
                        _measure_in_turns, label, folder, sources, size, batch_size, n_workers, device, policy
                    )
                    results += in_turns(settings, names=names, seconds=seconds, rounds=rounds)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{date.today().isoformat()}-loader-{device}{tag}"
    text = json.dumps({"machine": about, "policy": policy, "results": [asdict(r) for r in results]}, indent=1)
    stem.with_suffix(".json").write_text(text + "\n")
    plot(results, stem.with_suffix(".png"))
    print(f"written: {stem}.json, {stem}.png")


def _sources(folder: Path, beton: Path, size: int, settings: DataConfig) -> dict[str, Source]:
    """Each loader's source: image files, the same as a .beton file, or the same in memory (small images only)."""
    image_size = size or settings.image_size
    splits = open_source(
        "image_folder", folder, image_size=image_size, channels=settings.channels, exif=settings.exif
    )
    train = splits.train
    convert_splits("image_folder", splits, beton)
    in_beton = open_beton(beton.with_name(f"{beton.stem}.train.beton"), image_size=image_size)
    sources: dict[str, Source] = {"torch": train, "dali": train, "ffcv": in_beton, "ffcv-decode-twice": in_beton}
    if not size:
        sources["resident"] = ArraySource(train.stack(), train.labels, train.classes)
    return sources


def _measure_in_turns(
    label: str, folder: Path, sources: dict[str, Source], size: int, batch_size: int, workers: int, device: str,
    policy: str, settings: DataConfig, *, names: Iterable[str], seconds: float, rounds: int,
) -> list[LoaderRow]:  # fmt: skip
    """Rounds of all contenders in turns, so that drift of the machine affects all of them."""
    side = size or sources["torch"].image_size
    makers: dict[str, Callable[[], Batches]] = {}
    for name in names:
        if name == "torchvision":
            makers[name] = partial(torchvision_batches, folder, side, batch_size, workers, device, policy)
        elif name in sources and (size or name != "ffcv-decode-twice"):
            ours = partial(our_batches, name, sources[name], side, batch_size, workers, device, policy)
            makers[name] = partial(ours, crop=bool(size), on_corrupt=settings.on_corrupt)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    skipped: dict[str, MissingExtra] = {}
    for _, (name, make) in product(range(rounds), makers.items()):
        try:
            with closing(make()) as batches:
                measured[name].append(rate(batches, seconds, workers, device))
        except MissingExtra as missing:
            skipped[name] = missing
    for name, reason in skipped.items():
        print(f"{label}: {name} skipped: {reason}")
    results = []
    for name, own in measured.items():
        if own:
            speeds, costs = zip(*own, strict=True)
            best, worst, cpu_ms = max(speeds), min(speeds), 1e3 * min(costs)
            results.append(LoaderRow(label, name, batch_size, workers, best, worst, cpu_ms, rounds))
    baseline = next((r for r in results if r.name == "torchvision"), None)
    for r in results:
        ratio = f" {r.images_per_s / baseline.images_per_s:6.1f}x torchvision" if baseline else ""
        where = f"{label:>14} {r.name:>18} batch {batch_size:>5} workers {workers}"
        print(f"{where} {r.images_per_s:>10,.0f} images/s {r.cpu_ms_per_image:7.3f} ms of CPU{ratio}", flush=True)
    return results
