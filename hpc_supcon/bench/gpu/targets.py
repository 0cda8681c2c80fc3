"""What this package wants to reach on a GPU, and whether the numbers of the stages show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Stages = Mapping[str, Mapping[str, Any]]
"""Content of the files by stage."""
OURS = "triton-bf16"
PRIMARY = "resnet18", 32
TRAINED_S = 480.0
ACCURACY = 0.95


@dataclass(frozen=True)
class Target:
    """One line of the page. met: None where it was not measured, and `measured` says why."""

    text: str
    measured: str
    met: bool | None


def judge(stages: Stages) -> list[Target]:
    """Every target, met, missed, or not measured."""
    if any(content.get("device") != "cuda" for content in stages.values()):
        return [Target(text, "no GPU", None) for text, _ in TARGETS]
    return [Target(text, *_verdict(check, stages)) for text, check in TARGETS]


class NotMeasured(Exception):
    """The message says why."""


def _verdict(check: Callable[[Stages], tuple[str, bool]], stages: Stages) -> tuple[str, bool | None]:
    try:
        return check(stages)
    except NotMeasured as why:
        return str(why), None


def rows(stages: Stages, stage: str, table: str, **fields: Any) -> list[Mapping[str, Any]]:
    """Rows of a table with these values; empty where there are none."""
    found = stages.get(stage, {}).get("tables", {}).get(table, [])
    return [row for row in found if all(row.get(name) == value for name, value in fields.items())]


def _one(stages: Stages, stage: str, table: str, **fields: Any) -> Mapping[str, Any]:
    """The first such row. Raises NotMeasured, with the reason that the stage gives."""
    found = rows(stages, stage, table, **fields)
    if not found:
        raise NotMeasured(f"not measured: {why_not(stages, stage, fields)}")
    return found[0]


def why_not(stages: Stages, stage: str, fields: Mapping[str, Any]) -> str:
    """Why a stage has no such row: what it says of one with this name, or how it ended."""
    content = stages.get(stage)
    if content is None:
        return f"stage {stage} did not run"
    name, n = str(fields.get("name", fields.get("encoder", ""))), fields.get("n")
    for entry in content["skipped"]:
        of_row = (name and entry["what"].startswith(name)) or (n and entry["what"].startswith(f"N {n}"))
        if of_row or not fields:
            return str(entry["why"])
    return f"stage {stage}: {content['status']}"


def _faster(other: str, n: int, least: float) -> Callable[[Stages], tuple[str, bool]]:
    def check(stages: Stages) -> tuple[str, bool]:
        ours, theirs = (_one(stages, "loss", "loss", name=name, n=n, d=128) for name in (OURS, other))
        ratio = theirs["seconds"] / ours["seconds"]
        return (
            f"{ratio:.2f}x ({1e3 * ours['seconds']:.3f} ms, {other} {1e3 * theirs['seconds']:.3f} ms)",
            ratio >= least,
        )

    return check


def _rate(stages: Stages) -> tuple[str, bool]:
    tflops = _one(stages, "loss", "loss", name=OURS, n=65536, d=128)["tflops"]
    return f"{tflops:.0f} TFLOP/s" + (", the goal of 500 too" if tflops >= 500 else ""), tflops >= 350


def _memory(stages: Stages) -> tuple[str, bool]:
    extra = _one(stages, "loss", "loss", name=OURS, n=65536, d=128)["extra_bytes"] / 1e6
    return f"{extra:.0f} MB", extra < 200


def _host(stages: Stages) -> tuple[str, bool]:
    _one(stages, "loss", "loss", name=OURS, d=128)
    found = rows(stages, "loss", "loss", name=OURS, d=128)
    worst = max(found, key=lambda row: row["host_s"])
    return f"{1e6 * worst['host_s']:.0f} us at most (N {worst['n']:,})", worst["host_s"] < 150e-6


def _views(encoder: str, size: int, least: float, goal: float | None = None) -> Callable[[Stages], tuple[str, bool]]:
    def check(stages: Stages) -> tuple[str, bool]:
        _one(stages, "step", "step", encoder=encoder, image_size=size)
        found = rows(stages, "step", "step", encoder=encoder, image_size=size)
        best = max(found, key=lambda row: row["views_per_s"])
        rate = best["views_per_s"]
        more = f", the goal of {goal:,.0f} too" if goal is not None and rate >= goal else ""
        return f"{rate:,.0f} views/s ({best['mode']}, batch {best['batch_size']}){more}", rate >= least

    return check


def _resident(stages: Stages) -> tuple[str, bool]:
    _one(stages, "data", "loaders", name="resident")
    best = max(rows(stages, "data", "loaders", name="resident"), key=lambda row: row["images_per_s"])
    rate = best["images_per_s"]
    return f"{rate:,.0f} images/s ({best['policy']}, batch {best['batch_size']})", rate >= 5e6


def _accuracy(stages: Stages) -> tuple[str, bool]:
    _one(stages, "training", "accuracy")
    best = max(rows(stages, "training", "accuracy"), key=lambda row: row["accuracy"])
    text = f"{best['accuracy']:.4f} ({best['probe']}) after {best['epochs']} epochs, {best['seconds']:.0f} s"
    if best["accuracy"] < ACCURACY and best["seconds"] < 0.9 * TRAINED_S:
        raise NotMeasured(f"not measured: {text}; the budget left no more")
    return text, best["accuracy"] >= ACCURACY and best["seconds"] < TRAINED_S


TARGETS: list[tuple[str, Callable[[Stages], tuple[str, bool]]]] = [
    ("loss at N 16,384, D 128: at least 12 times as fast as eager dense", _faster("dense", 16384, 12)),
    ("loss at N 16,384, D 128: at least 2 times as fast as torch.compile", _faster("compiled", 16384, 2)),
    ("loss at N 65,536 in bf16: at least 350 TFLOP/s (6 N^2 D), 500 as the goal", _rate),
    ("loss at N 4,096: not slower than dense", _faster("dense", 4096, 1)),
    ("loss at N 65,536: under 200 MB beyond its inputs", _memory),
    ("loss at any N: under 150 us of host time, forward and backward", _host),
    ("resnet18, 32 px: at least 60,000 views/s, 90,000 as the goal", _views(*PRIMARY, 60e3, 90e3)),
    ("resnet50, 224 px: at least 6,000 views/s", _views("resnet50", 224, 6e3)),
    ("CIFAR in memory, two views: at least 5 million images/s", _resident),
    ("ResNet-18, CIFAR-10 (JPEG), two stages: 95 % in under 8 minutes", _accuracy),
]
