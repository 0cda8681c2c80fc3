"""Views/s, peak memory and time per phase of the training step, for batch sizes, encoders, precisions and compile.

    hpc-supcon bench step --encoder resnet18 --precision fp32 --precision bf16 augment.policy=flip_crop

Batch sizes double from 32 until memory is full, or until a step takes too long. Each combination of encoder,
precision and compile is measured in a separate process, because the last batch size may end it. Then the step is
compared with a plain loop (see plain_loop.py) on the same model, images and augmentation; both run in turns. Writes
JSON and PNG, and recommends a batch size for this machine.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..phases import BACKWARD, ENCODER
from ..training.profile import ORDER
from .common import machine, memory_available, resident
from .step_compare import check_comparable, compare
from .step_session import OUT_OF_MEMORY, ROUNDS, WARM_UP, StepRow, StepSession, check, step_config

SMALLEST, LARGEST = 32, 1 << 17
ENOUGH = 0.95
"""Share of the best throughput: the smallest batch size that reaches it is recommended."""


@dataclass(frozen=True)
class Limits:
    """How much is measured."""

    seconds: float = 3.0
    """Measured time of each row."""
    longest: float = 5.0
    """Seconds; larger batch sizes are not tried after a step that took longer."""
    memory: int | None = None
    """Bytes that a step may use; None: all that is free."""


def measure_row(
    row: StepRow,
    overrides: Sequence[str],
    device: torch.device,
    seconds: float,
    empty: int = 0,
    then: Callable[[StepSession], None] = lambda session: None,
) -> StepRow:
    """`row` with its numbers, or as out of memory.

    empty: bytes of this process before the first row, on a CPU. then: called with the session after it is measured.
    """
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    else:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        config = step_config(row.encoder, row.precision, row.compile, row.batch_size, overrides)
        with closing(StepSession(config, device)) as session:
            session.run(WARM_UP - 1)
            once = session.measure(1).total
            steps = max(1, math.ceil(seconds / ROUNDS / once))
            rounds = [session.measure(steps) for _ in range(ROUNDS)]
            peak = resident("VmHWM") - empty if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
            then(session)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "memory" not in str(error):
            raise
        return _without_numbers(row, OUT_OF_MEMORY)
    best, worst = min(rounds, key=lambda b: b.total), max(rounds, key=lambda b: b.total)
    views = row.batch_size * config.data.views_per_image
    return StepRow(
        row.encoder, row.precision, row.compile, row.batch_size, "ok",
        views_per_s=views / best.total, views_per_s_worst=views / worst.total, encoder_share=best.share(ENCODER),
        peak_bytes=peak, steps=steps, seconds=best.seconds,
    )  # fmt: skip


def _without_numbers(row: StepRow, status: str) -> StepRow:
    return StepRow(row.encoder, row.precision, row.compile, row.batch_size, status)


def _child(
    pipe: Connection, rows: list[StepRow], overrides: list[str], kind: str, limits: Limits, threads: int
) -> None:
    """Measures the rows one by one and sends each; stops when memory is full or a step takes too long."""
    torch.set_num_threads(threads)
    device, empty = torch.device(kind), 0
    if kind == "cpu":
        empty = resident("VmRSS")
        # allocations then fail in this process; otherwise the kernel would kill some process of the machine
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


def run_rows(rows: list[StepRow], overrides: Sequence[str], kind: str, limits: Limits, threads: int) -> list[StepRow]:
    """Measure the rows, ordered by batch size, in a separate process, up to the first one that exceeds the limits."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, rows, list(overrides), kind, limits, threads)
    child = context.Process(target=_child, args=arguments)
    child.start()
    theirs.close()
    results: list[StepRow] = []
    try:
        while True:
            results.append(ours.recv())
            print(line(results[-1]), flush=True)
    except EOFError:
        child.join()
    if child.exitcode == -9:  # killed by the kernel because memory was full
        results.append(_without_numbers(rows[len(results)], OUT_OF_MEMORY))
        print(line(results[-1]), flush=True)
    elif child.exitcode:
        raise RuntimeError(f"measuring {rows[len(results)].label} failed: see above")
    return results


def line(r: StepRow) -> str:
    start = f"{r.label:>24} batch {r.batch_size:>6}  "
    if not r.seconds:
        return start + r.status
    total = sum(r.seconds.values())
    parts = "  ".join(f"{name} {s / total:.0%}" for name, s in sorted(r.seconds.items(), key=lambda x: -x[1])[:5])
    return (
        f"{start}{r.views_per_s:>10,.1f} views/s  {r.peak_bytes / 2**20:>9,.0f} MiB  {1e3 * total:>9,.1f} ms  "
        f"encoder {r.encoder_share:.1%}  ({parts})"
    )


def recommend(results: Sequence[StepRow]) -> list[str]:
    """One line for each encoder: the smallest batch size that is nearly the fastest, and the largest that fits."""
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
    for encoder, precision, compiled in grid:  # before minutes of measuring
        check(step_config(encoder, precision, compiled, sizes[0], overrides), kind)
    if plain:
        check_comparable(step_config(encoders[0], "fp32", False, sizes[0], overrides))
    about = machine(kind)
    print(f"{about['device']}, {threads} threads, matmul {about['matmul_tflops']:.3f} TFLOP/s")
    began = time.perf_counter()
    results: list[StepRow] = []
    for encoder, precision, compiled in grid:
        rows = [StepRow(encoder, precision, compiled, size, "") for size in sizes]
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


def plot(results: Sequence[StepRow], path: Path) -> None:
    """Draw views/s and memory over the batch size, and the shares of the phases at each line's best batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    labels = list(dict.fromkeys(r.label for r in results))
    best: list[StepRow] = []
    for label in labels:
        mine = [r for r in results if r.label == label and r.seconds]
        if not mine:
            continue
        best.append(max(mine, key=lambda r: r.views_per_s))
        axes[0].plot([r.batch_size for r in mine], [r.views_per_s for r in mine], marker="o", label=label)
        axes[1].plot([r.batch_size for r in mine], [r.peak_bytes / 2**20 for r in mine], marker="o", label=label)
    sizes = sorted({r.batch_size for r in results})
    for axis, title in zip(axes, ("views/s", "peak memory, MiB"), strict=False):
        axis.set(xscale="log", yscale="log", xlabel="batch size, images", title=title)
        axis.set_xticks(sizes, labels=[str(n) for n in sizes], rotation=45)
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
        if best:
            axis.legend()
    _draw_shares(axes[2], best)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_shares(axis: object, rows: Sequence[StepRow]) -> None:
    """A bar for each row, divided among the phases."""
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    names = [f"{r.label}, {r.batch_size}" for r in rows]
    left = [0.0] * len(rows)
    for k, name in enumerate(ORDER):
        shares = []
        for r in rows:
            seconds = r.seconds or {}
            own = seconds.get(name, 0.0) + seconds.get(name + BACKWARD, 0.0)
            shares.append(100 * own / sum(seconds.values()))
        if any(share > 0 for share in shares):
            axis.barh(names, shares, left=left, label=name, color=f"C{k}")
            left = [a + b for a, b in zip(left, shares, strict=True)]
    axis.set(title="share of the step at the best batch size, %", xlim=(0, 100))
    axis.invert_yaxis()
    if rows:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4)
