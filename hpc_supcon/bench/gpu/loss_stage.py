"""Stage loss: forward, backward, host time and memory of the contrastive loss against its alternatives."""

from __future__ import annotations

from dataclasses import asdict

from ...errors import MissingExtra
from ..loss import LossRow
from ..loss import run as measure_loss
from ..loss_contenders import contender
from .work import Work

ALL = ("dense", "dense-tf32", "compiled", "pml", "triton-tf32", "triton-bf16")
"""The first is what gradients are compared with."""
ON_CUDA = (
    # rows, dimensions, contenders, seconds that it takes about; first those that have a target
    (16384, 128, ALL, 12),
    (65536, 128, ALL, 10),
    (4096, 128, ALL, 8),
    (1024, 128, ALL, 8),
    (32768, 128, ALL, 10),
    (2048, 128, ALL, 8),
    (8192, 128, ALL, 8),
    (16384, 512, ALL, 15),
    (16384, 2048, ALL, 20),
)
ON_CPU = ((256, 16, ("dense", "dense-tf32", "pml", "tiled"), 1),)


def run(work: Work) -> None:
    if work.is_small:
        work.record.skip("compiled", "on a GPU only: compiling for a CPU takes longer than all else")
    missing: set[str] = set()

    def measured(row: LossRow) -> None:
        work.record.row("loss", **asdict(row))

    for n, d, names, seconds in ON_CPU if work.is_small else ON_CUDA:
        what = f"N {n}, D {d}"
        if not work.has_time(what, seconds):
            continue
        installed = [name for name in names if name not in missing and _is_installed(name, missing, work)]
        with work.measuring(what):
            measure_loss(
                [n], d, installed, work.kind, 1 if work.is_small else 5,
                memory=not work.is_small, measured=measured, skipped=work.record.skip,
            )  # fmt: skip


def _is_installed(name: str, missing: set[str], work: Work) -> bool:
    if name == "compiled":
        return True  # made anew for each size, where it is measured
    try:
        contender(name)
    except MissingExtra as error:
        missing.add(name)
        work.skip(name, str(error))
    return name not in missing
