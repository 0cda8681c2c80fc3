"""A first recipe for a data set: what its folder holds, and settings that fit it, this machine and a time.

The numbers are those of the recipes `mnist` and `cifar10-folder`, which were tried, carried over to other sizes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from ..config import yaml12
from ..data import open_source
from ..data.sources.image_file import SUFFIXES
from ..data.sources.quiet import silence_pillow
from ..errors import DataError
from ..models import build_encoder

Objective = Literal["supcon", "tcl", "cross_entropy", "simclr"]
LOSSES: dict[Objective, str] = {
    "supcon": "supcon_out", "tcl": "tcl", "cross_entropy": "cross_entropy", "simclr": "simclr"
}  # fmt: skip
"""Objective -> loss.name."""
TORCHVISION = {
    "MNIST/raw": "mnist",
    "FashionMNIST/raw": "fashion_mnist",
    "cifar-10-batches-py": "cifar10",
    "cifar-100-python": "cifar100",
}
"""Folder below the root -> the source whose files torchvision keeps there."""
SAMPLE = 500
"""Image files whose headers are read."""
SIZES = (32, 64, 96, 128, 224)
SMALL = 64
"""Largest side in pixels of what a CPU trains on, and of encoders' small stems."""
BASE_BATCH, BASE_RATE = 256, 0.4
BF16_GAIN = 1.2
"""A CPU without instructions for bf16 is slower in it, one with them up to twice as fast."""
SHARE = 0.6
"""Share of the time that training may take; the rest is for reading, probes and the page."""


@dataclass(frozen=True)
class DataFacts:
    """What a folder holds. side: pixels, of the shorter side of most images; uniform: all are squares of one size."""

    source: str
    root: Path
    images: int
    classes: dict[str, int]
    side: int
    uniform: bool
    channels: int
    mixed_modes: bool

    @property
    def labeled(self) -> bool:
        return len(self.classes) > 1


def look_at(root: Path) -> DataFacts:
    """Raises DataError where nothing is found that can be trained on."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: name the folder of your data")
    found = [name for part, name in TORCHVISION.items() if (root / part).is_dir()]
    if len(found) > 1:
        raise DataError(f"{root} holds {', '.join(found)}: name a folder with one of them")
    if found:
        return _of_torchvision(found[0], root)
    labels = "folders" if _has_class_folders(root) else "none"
    train = open_source("image_folder", root, image_size=1, channels=3, labels=labels).train  # lists, decodes nothing
    assert train.paths is not None
    counts = torch.bincount(train.labels, minlength=len(train.classes)).tolist() if train.classes else []
    sizes, modes = _headers(train.paths)
    shorter = sorted(min(size) for size in sizes.elements())
    gray = all(mode in ("1", "L", "LA") for mode in modes)
    return DataFacts(
        source="image_folder",
        root=root,
        images=len(train),
        classes=dict(zip(train.classes, counts, strict=True)),
        side=shorter[len(shorter) // 2],
        uniform=len(sizes) == 1 and len(set(next(iter(sizes)))) == 1,
        channels=1 if gray else 3,
        mixed_modes=len(modes) > 1 or not set(modes) <= {"L", "RGB"},
    )


def _of_torchvision(name: str, root: Path) -> DataFacts:
    train = open_source(name, root).train
    counts = torch.bincount(train.labels, minlength=len(train.classes)).tolist()
    classes = dict(zip(train.classes, counts, strict=True))
    return DataFacts(name, root, len(train), classes, train.image_size, True, train.channels, False)


def _has_class_folders(root: Path) -> bool:
    train = root / "train"
    if not train.is_dir() or any(p.name.lower().endswith(SUFFIXES) for p in train.iterdir()):
        return False
    return any(p.is_dir() for p in train.iterdir())


def _headers(paths: tuple[Path, ...]) -> tuple[Counter[tuple[int, int]], Counter[str]]:
    """Sizes and modes of evenly spread files; those that cannot be opened are passed over."""
    sizes, modes = Counter[tuple[int, int]](), Counter[str]()
    silence_pillow()
    for path in paths[:: max(1, len(paths) // SAMPLE)]:
        try:
            with Image.open(path) as image:
                sizes[image.size] += 1
                modes[image.mode] += 1
        except (OSError, ValueError, SyntaxError):
            continue
    if not sizes:
        raise DataError(f"none of the images opens, such as {paths[0]}: see hpc-supcon verify")
    return sizes, modes


def recipe(facts: DataFacts, objective: Objective, *, mirrored: bool, minutes: float, device: str) -> dict[str, Any]:
    """Settings of a run on these data. minutes: about how long it may take. device: cpu or cuda."""
    side = facts.side if facts.uniform else max((s for s in SIZES if s <= facts.side), default=SIZES[0])
    side = min(side, SMALL) if device == "cpu" else min(side, SIZES[-1])
    resized = side != facts.side or not facts.uniform
    views = 1 if objective == "cross_entropy" else 2
    batch = _batch_size(facts.images, BASE_BATCH if device == "cpu" else 4 * BASE_BATCH)
    encoder = _encoder(side, facts.channels, device)
    precision, rate = _fastest_precision(encoder, side, facts.channels, device)
    epochs = int(min(100, max(3, SHARE * 60 * minutes * rate / (facts.images * views))))
    data: dict[str, Any] = {"source": facts.source, "root": str(facts.root), "batch_size": batch, "views": views}
    if resized:
        data["image_size"] = side
    if facts.mixed_modes:
        data["channels"] = facts.channels
    if not facts.labeled:
        data["labels"] = "none"
    if device != "cpu" and facts.side > SMALL:
        data |= {"crop_while_decoding": True, "workers": 8}
    return {
        "name": facts.root.resolve().name or "first",
        "data": data,
        "augment": _augment(objective, side, facts.channels, mirrored),
        "model": {"encoder": encoder, "projection_hidden": 128 if device == "cpu" else 512},
        "loss": {"name": LOSSES[objective], **({"temperature": 0.2} if objective == "simclr" else {})},
        "optim": {
            "lr": BASE_RATE * batch / BASE_BATCH, "nesterov": True, "weight_decay": 5e-4, "schedule": "one_cycle",
            "warmup_epochs": max(1, epochs // 6),
        },
        "train": {"epochs": epochs, **({"precision": precision} if precision != "auto" else {})},
        "checkpoint": {"every_epochs": max(1, epochs // 10)},
    }  # fmt: skip


def to_yaml(settings: Mapping[str, Any], facts: DataFacts) -> str:
    """The recipe as a file, after lines that say what it is for."""
    few, many = min(facts.classes.values(), default=0), max(facts.classes.values(), default=0)
    lines = [f"# {facts.images} training images of {facts.root}, {facts.side} px"]
    each = f"{few}" if few == many else f"{few} to {many}"
    lines[0] += f", {len(facts.classes)} classes of {each} images" if facts.labeled else ", without labels"
    if few and many > 10 * few:
        lines.append("# Rare classes come more often with data.sampler=long_tail_aware.")
    if not facts.labeled:
        lines.append("# To evaluate the encoder: hpc-supcon probe RUN_DIR data.source=... data.root=LABELED")
    return "\n".join(lines) + "\n" + yaml12.dumps(dict(settings))


def _batch_size(images: int, largest: int) -> int:
    """The power of two with 20 batches in an epoch or more, 16 to `largest`."""
    size = largest
    while size > 16 and size * 20 > images:
        size //= 2
    return size


def _encoder(side: int, channels: int, device: str) -> str:
    if device == "cpu":
        return "conv" if (channels == 1 and side <= 32) or side < 16 else "resnet9_small"
    return "resnet18" if side <= SMALL else "resnet50"


def _augment(objective: Objective, side: int, channels: int, mirrored: bool) -> dict[str, Any]:
    flip = {"flip": 0.5 if mirrored else 0.0}
    if objective == "simclr":  # without labels, only what the views differ in is not learned
        return {"policy": "simaugment", "crop_scale": [0.2, 1.0], **flip}
    if channels == 1:
        return {"policy": "flip_crop", "crop_scale": [0.4, 1.0], **flip}
    if side <= SMALL:
        return {"policy": "pad_crop", "padding": max(1, side // 8), "padding_mode": "reflect", **flip}
    return {"policy": "simaugment", "crop_scale": [0.4, 1.0], **flip}


def _fastest_precision(encoder: str, side: int, channels: int, device: str) -> tuple[str, float]:
    """train.precision and views per second: on a CPU bf16 where it is clearly faster, elsewhere the default."""
    rate = _views_per_second(encoder, side, channels, device, torch.float32)
    if device == "cpu":
        bf16 = _views_per_second(encoder, side, channels, device, torch.bfloat16)
        if bf16 > BF16_GAIN * rate:
            return "bf16", bf16
    return "auto", rate


def _views_per_second(
    encoder: str, side: int, channels: int, device: str, dtype: torch.dtype, batch: int = 64
) -> float:
    """Of forward and backward pass, the faster of two after one to warm up."""
    model = build_encoder(encoder, in_channels=channels, image_size=side).to(device)
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(batch, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
    best = float("inf")
    for i in range(3):
        start = time.monotonic()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            y = model(x)
        y.float().square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - start) if i else best
    return batch / best
