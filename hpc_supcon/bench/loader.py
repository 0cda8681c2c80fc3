"""Images/s of every loader, two augmented views delivered, normalised, on the device; against torchvision's way.

    hpc-supcon bench loader --data /data/cifar10 --batch-size 512 --workers 2

The baseline is what most code does: torchvision's ImageFolder with per-sample transforms applied twice, in a
DataLoader. All contenders take the same files, batch sizes and workers, side by side in one process.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from ..data import ArraySource, CropOptions, LoaderOptions, Source, TrainOrder, Views, build_loader, convert_splits
from ..data.beton import open_beton
from ..data.folder import open_folder
from ..errors import ConfigError, MissingExtra
from .common import machine

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGE = 224
"""Side in px of the views of large images; small ones keep their size."""
CONTENDERS = ("torchvision", "resident", "torch", "ffcv", "ffcv-decode-twice", "dali")


Batches = Generator[Tensor, None, None]
"""float32 [B, 2, 3, S, S]"""
_TORCHVISION_COLOUR = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(0.2)]


@dataclass(frozen=True)
class Result:
    """Images/s, each as two views. The best of `rounds` rounds."""

    data: str
    name: str
    batch_size: int
    workers: int
    images_per_s: float
    images_per_s_worst: float
    rounds: int


def make_large_set(folder: Path, images: int = 1024, side: int = 256) -> Path:
    """An image folder of smooth random JPEGs of side x side px: detail like a photograph's, no download."""
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
            *(_TORCHVISION_COLOUR if policy == "simaugment" else []),
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
    name: str, source: Source, size: int, batch_size: int, workers: int, device: str, policy: str, *, crop: bool
) -> Batches:
    """The same through one of our loaders; endless. `crop`: the loader crops while decoding."""
    loader_name, _, twice = name.partition("-")
    views_per_decode = 1 if twice else 2
    options = LoaderOptions(workers=workers, crop=CropOptions(views_per_decode, size) if crop else None)
    views = Views(views_per_decode, size, mean=MEAN, std=STD, policy=policy, channels_last=True).to(device)
    order = TrainOrder(len(source), batch_size)
    loader = build_loader(loader_name, source, order, seed=0, rank=0, world_size=1, device=device, options=options)
    with closing(loader):
        for epoch in count():
            batches = loader.epoch(epoch)
            if twice:
                for first, second in zip(batches, batches, strict=False):
                    both = views(first.images), views(second.images)
                    yield both[0]  # not put together: that would be one more copy
            else:
                yield from (views(batch.images) for batch in batches)


def rate(batches: Batches, seconds: float, device: str) -> float:
    """Images/s after one batch of warm-up."""
    next(batches)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches))
        if device != "cpu":
            torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def measure(
    data: Path | None,
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

    data: an image folder of small images (None: large ones only). A contender whose package is missing is
    left out, and the table says so.
    """
    if policy not in ("flip_crop", "simaugment"):
        raise ConfigError(f"the comparison knows the policies flip_crop and simaugment, not {policy}")
    if unknown := set(names) - set(CONTENDERS):
        raise ConfigError(f"unknown contenders {', '.join(sorted(unknown))}; known: {', '.join(CONTENDERS)}")
    about = machine(device)
    print(f"{about['device']}, {about['threads']} threads, {policy}")
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        sets = [("256-px JPEG", make_large_set(Path(scratch) / "large"), LARGE)]
        if data is not None:
            sets.insert(0, (data.name, data, 0))
        for label, folder, size in sets:
            sources = _sources(folder, Path(scratch) / f"{label}.beton", size)
            # large images come in smaller batches
            own_sizes = [max(32, b // 8) if size else b for b in batch_sizes]
            for batch_size, n_workers in ((b, w) for b in own_sizes for w in workers):
                if batch_size <= len(sources["torch"]):
                    contest = partial(_contest, label, folder, sources, size, batch_size, n_workers, device, policy)
                    results += contest(names=names, seconds=seconds, rounds=rounds)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{date.today().isoformat()}-loader-{device}{tag}"
    text = json.dumps({"machine": about, "policy": policy, "results": [asdict(r) for r in results]}, indent=1)
    stem.with_suffix(".json").write_text(text + "\n")
    plot(results, stem.with_suffix(".png"))
    print(f"written: {stem}.json, {stem}.png")


def _sources(folder: Path, beton: Path, size: int) -> dict[str, Source]:
    """What each loader reads: files, the same as a .beton, the same in memory (small images only)."""
    opened = open_folder(folder, image_size=size or None, channels=None)
    train = opened[0]
    convert_splits("image_folder", opened, beton)
    in_beton = open_beton(beton.with_name(f"{beton.stem}.train.beton"), image_size=size or None)
    sources: dict[str, Source] = {"torch": train, "dali": train, "ffcv": in_beton, "ffcv-decode-twice": in_beton}
    if not size:
        sources["resident"] = ArraySource(train.stack(), train.labels, train.classes)
    return sources


def _contest(
    label: str, folder: Path, sources: dict[str, Source], size: int, batch_size: int, workers: int, device: str,
    policy: str, *, names: Iterable[str], seconds: float, rounds: int,
) -> list[Result]:  # fmt: skip
    results = []
    baseline = None
    for name in names:
        side = size or sources["torch"].image_size
        rates = []
        try:
            for _ in range(rounds):
                if name == "torchvision":
                    batches = torchvision_batches(folder, side, batch_size, workers, device, policy)
                elif name in sources and (size or name != "ffcv-decode-twice"):
                    batches = our_batches(
                        name, sources[name], side, batch_size, workers, device, policy, crop=bool(size)
                    )
                else:
                    break
                with closing(batches):
                    rates.append(rate(batches, seconds, device))
        except MissingExtra as missing:
            print(f"{label}: {name} left out: {missing}")
        if rates:
            results.append(Result(label, name, batch_size, workers, max(rates), min(rates), rounds))
            baseline = baseline or (max(rates) if name == "torchvision" else None)
            speed = f"{max(rates):>10,.0f} images/s" + (
                f" {max(rates) / baseline:6.1f}x torchvision" if baseline else ""
            )
            print(f"{label:>14} {name:>18} batch {batch_size:>5} workers {workers}  {speed}")
    return results


def plot(results: Sequence[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = list(dict.fromkeys(r.data for r in results))
    figure, axes = plt.subplots(1, len(labels), figsize=(5.5 * len(labels), 4), layout="constrained", squeeze=False)
    for axis, label in zip(axes[0], labels, strict=True):
        own = [r for r in results if r.data == label]
        names, sizes = list(dict.fromkeys(r.name for r in own)), sorted({r.batch_size for r in own})
        speeds = {(r.name, r.batch_size): r.images_per_s for r in sorted(own, key=lambda r: r.images_per_s)}
        best = {n: [speeds.get((n, b), 0.0) for b in sizes] for n in names}
        axis.set_title(f"images/s, two views: {label}")
        if len(sizes) == 1:
            bars = axis.barh(names[::-1], [best[n][0] for n in names[::-1]])
            axis.bar_label(bars, fmt="{:,.0f}", padding=3)
            axis.margins(x=0.15)
            continue
        for name in names:
            axis.plot(sizes, best[name], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="batch size")
        axis.set_xticks(sizes, labels=[str(n) for n in sizes])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
