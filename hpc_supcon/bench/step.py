"""Views/s, peak memory and the breakdown of the training step, over batch size, encoder, precision and compile.

    hpc-supcon bench step --encoder resnet18 --precision fp32 --precision bf16 augment.policy=flip_crop

Batch sizes double from 32 until memory ends, or until a step takes too long to be worth waiting for. Every encoder,
precision and compile is measured in a process of its own, which may die of its last batch size. Then the step is set
beside a plain loop (see plain_loop.py) on the same model, images and augmentation, in turns within one process.
Writes JSON and PNG, and says which batch size to take on this machine.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..phases import ENCODER
from .common import machine, memory_available, resident
from .step_compare import check_comparable, compare
from .step_plot import plot
from .step_session import OUT_OF_MEMORY, ROUNDS, WARM_UP, Result, Session, check, settings

SMALLEST, LARGEST = 32, 1 << 17
ENOUGH = 0.95
"""Of the best throughput: the smallest batch that gives it is recommended."""


@dataclass(frozen=True)
class Limits:
    """`seconds` measured for each row; a step of more than `longest` s is the last; `memory` in bytes, None: all."""

    seconds: float = 3.0
    longest: float = 5.0
    memory: int | None = None


def measure_row(
    row: Result, overrides: Sequence[str], device: torch.device, seconds: float, empty: int = 0
) -> Result:
    """`row` with its numbers, or as out of memory. empty: bytes of this process before the first row, on a CPU."""
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    else:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        config = settings(row.encoder, row.precision, row.compile, row.batch_size, overrides)
        with closing(Session(config, device)) as session:
            session.run(WARM_UP - 1)
            once = session.measure(1).total
            steps = max(1, math.ceil(seconds / ROUNDS / once))
            rounds = [session.measure(steps) for _ in range(ROUNDS)]
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "memory" not in str(error):
            raise
        return _without_numbers(row, OUT_OF_MEMORY)
    peak = resident("VmHWM") - empty if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
    best, worst = min(rounds, key=lambda b: b.total), max(rounds, key=lambda b: b.total)
    views = row.batch_size * config.data.views
    return Result(
        row.encoder, row.precision, row.compile, row.batch_size, "ok",
        views_per_s=views / best.total, views_per_s_worst=views / worst.total, encoder_share=best.share(ENCODER),
        peak_bytes=peak, steps=steps, seconds=best.seconds,
    )  # fmt: skip


def _without_numbers(row: Result, status: str) -> Result:
    return Result(row.encoder, row.precision, row.compile, row.batch_size, status)


def _child(
    pipe: Connection, rows: list[Result], overrides: list[str], kind: str, limits: Limits, threads: int
) -> None:
    """Measures the rows in turn and sends each; stops after memory or patience has ended."""
    torch.set_num_threads(threads)
    device, empty = torch.device(kind), 0
    if kind == "cpu":
        empty = resident("VmRSS")
        # torch then fails by itself, where the kernel would end any process of the machine
        most = resident("VmData") + (limits.memory or int(0.9 * memory_available()))
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    elif limits.memory:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limits.memory / whole))
    for row in rows:
        result = measure_row(row, overrides, device, limits.seconds, empty)
        pipe.send(result)
        if not result.fits or sum((result.seconds or {}).values()) > limits.longest:
            return


def run_rows(rows: list[Result], overrides: Sequence[str], kind: str, limits: Limits, threads: int) -> list[Result]:
    """The rows, of growing batch size, measured in a process of their own as far as memory and patience go."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, rows, list(overrides), kind, limits, threads)
    child = context.Process(target=_child, args=arguments)
    child.start()
    theirs.close()
    results: list[Result] = []
    try:
        while True:
            results.append(ours.recv())
            print(line(results[-1]), flush=True)
    except EOFError:
        child.join()
    if child.exitcode == -9:  # the kernel's answer to a full memory
        results.append(_without_numbers(rows[len(results)], OUT_OF_MEMORY))
        print(line(results[-1]), flush=True)
    elif child.exitcode:
        raise RuntimeError(f"measuring {rows[len(results)].label} failed: see above")
    return results


def line(r: Result) -> str:
    start = f"{r.label:>24} batch {r.batch_size:>6}  "
    if not r.seconds:
        return start + r.status
    total = sum(r.seconds.values())
    parts = "  ".join(f"{name} {s / total:.0%}" for name, s in sorted(r.seconds.items(), key=lambda x: -x[1])[:5])
    return (
        f"{start}{r.views_per_s:>10,.1f} views/s  {r.peak_bytes / 2**20:>9,.0f} MiB  {1e3 * total:>9,.1f} ms  "
        f"encoder {r.encoder_share:.1%}  ({parts})"
    )


def recommend(results: Sequence[Result]) -> list[str]:
    """One line for each encoder: the smallest batch that is as good as the best, and the largest that fits."""
    lines = []
    for encoder in dict.fromkeys(r.encoder for r in results):
        fitting = [r for r in results if r.encoder == encoder and r.fits]
        if not fitting:
            lines.append(f"{encoder}: no batch size fits this machine")
            continue
        best = max(r.views_per_s for r in fitting)
        chosen = min((r for r in fitting if r.views_per_s >= ENOUGH * best), key=lambda r: r.batch_size)
        tried = [r for r in results if r.encoder == encoder]
        end = "" if any(not r.fits for r in tried) else " (larger ones were not tried)"
        lines.append(
            f"{encoder}: data.batch_size={chosen.batch_size} ({chosen.precision}{', compiled' * chosen.compile}) "
            f"gives {chosen.views_per_s:,.0f} views/s, the best being {best:,.0f}; the largest that fits: "
            f"{max(r.batch_size for r in fitting)}{end}"
        )
    return lines


def measure(
    encoders: Sequence[str], batch_sizes: Sequence[int] | None, precisions: Sequence[str], compiles: Sequence[bool],
    overrides: Sequence[str], *, kind: str, limits: Limits, threads: int, plain: bool, tag: str, out: Path,
) -> None:  # fmt: skip
    """Run, print, and write out/DATE-step-DEVICE[TAG].json and .png. Raises ConfigError, DataError."""
    torch.set_num_threads(threads)
    sizes = sorted(batch_sizes or [SMALLEST << k for k in range(LARGEST.bit_length()) if SMALLEST << k <= LARGEST])
    grid = list(product(encoders, precisions, compiles))
    for encoder, precision, compiled in grid:  # a mistake is met before minutes of measuring
        check(settings(encoder, precision, compiled, sizes[0], overrides), kind)
    if plain:
        check_comparable(settings(encoders[0], "fp32", False, sizes[0], overrides))
    about = machine(kind)
    print(f"{about['device']}, {threads} threads, matmul {about['matmul_tflops']:.3f} TFLOP/s")
    began = time.perf_counter()
    results: list[Result] = []
    for encoder, precision, compiled in grid:
        rows = [Result(encoder, precision, compiled, size, "") for size in sizes]
        results += run_rows(rows, overrides, kind, limits, threads)
    compared = [compare(e, results, overrides, torch.device(kind), limits.seconds) for e in encoders] if plain else []
    advice = recommend(results)
    print("\n".join(advice))
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{date.today().isoformat()}-step-{kind}{tag}"
    record: dict[str, Any] = {
        "machine": about, "overrides": list(overrides), "seconds": round(time.perf_counter() - began, 1),
        "results": [asdict(r) for r in results], "against_plain_loop": [asdict(c) for c in compared if c],
        "advice": advice,
    }  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(results, stem.with_suffix(".png"))
    print(f"written: {stem}.json, {stem}.png")
