"""Time and peak extra memory of one contrastive loss, forward + backward: this package against the alternatives.

    hpc-supcon bench loss --size 4096 --size 8192 --only dense --only tiled

The contenders are those of loss_contenders.py. Times are measured in rounds of all of them in one process, so that
drift of the machine affects all: on CUDA by events, and beside them the time until the call returns to the host. CPU
memory is measured in a new process for each, as the peak resident set minus that before the call. Extra memory is
everything except the features, including the gradient. Writes JSON and PNG.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..phases import REST, Clock
from .common import host_waits, machine, memory_available, resident, synchronize
from .loss_contenders import DENSE, Loss, contender

CLASSES = 100
DENSE_COPIES = 10
"""About the number of fp32 N x N matrices that the dense contenders hold at their peak. On a CPU, sizes above the
memory limit are skipped; on CUDA they are tried, and an end of memory is told."""


@dataclass(frozen=True)
class CallTime:
    """Seconds of one call: on CUDA `forward` and `backward` are the device's, `host` is until the call returned."""

    forward: float
    backward: float
    host: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class LossRow:
    """The measurement of one contender at one size, forward + backward."""

    name: str
    n: int
    d: int
    seconds: float
    """The best of `runs`; forward_s and backward_s are its parts."""
    forward_s: float
    backward_s: float
    host_s: float
    """Until the call returned to the host, the best of `runs`."""
    host_waits: int | None
    """How often the host waited for the device in a call; None where there is no such device."""
    seconds_median: float
    seconds_worst: float
    runs: int
    extra_bytes: int | None
    """Peak memory without the features; None: not measured."""
    tflops: float
    """6 N^2 D / seconds: as if every contender did the arithmetic of three dense matmuls."""
    loss: float
    gradient_error: float | None
    """Relative difference from the first contender of the same size; None for that one."""


def make_batch(n: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, d, device=device, requires_grad=True), torch.arange(n, device=device) % CLASSES


def one_call(name: str, loss: Loss, z: Tensor, labels: Tensor) -> tuple[CallTime, float]:
    """(times, value) of forward + backward; replaces z.grad. `name`: of the contender."""
    z.grad = None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "dense-tf32" else "highest")
    try:
        synchronize(z)
        clock, start = Clock(z.device), time.perf_counter()
        clock.switch("forward")
        value = loss(z, labels)
        clock.switch("backward")
        value.backward()
        clock.switch(REST)
        host = time.perf_counter() - start
        seconds = clock.read()
    finally:
        torch.set_float32_matmul_precision(before)
    return CallTime(seconds["forward"], seconds["backward"], host), float(value.detach())


def _forward_backward(loss: Loss, z: Tensor, labels: Tensor) -> None:
    loss(z, labels).backward()


def _cpu_memory(name: str, n: int, d: int, threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    loss = contender(name)
    # libraries allocate some memory once, which is not the loss's
    one_call(name, loss, *make_batch(CLASSES * 2, d, "cpu"))
    if name == "compiled":
        one_call(name, loss, *make_batch(n, d, "cpu"))
    z, labels = make_batch(n, d, "cpu")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    one_call(name, loss, z, labels)
    answer.put(resident("VmHWM") - before)


def peak_extra(name: str, loss: Loss, n: int, d: int, device: str) -> int:
    """Peak bytes of one forward + backward, without the batch itself; `loss`: of the contender `name`, warmed up."""
    if device == "cpu":
        context = multiprocessing.get_context("spawn")
        answer = context.Queue()
        child = context.Process(target=_cpu_memory, args=(name, n, d, torch.get_num_threads(), answer))
        child.start()
        extra = answer.get(timeout=1800)
        child.join()
        return int(extra)
    z, labels = make_batch(n, d, device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one_call(name, loss, z, labels)
    return torch.cuda.max_memory_allocated() - before


def run(
    sizes: Sequence[int],
    d: int = 128,
    names: Sequence[str] = ("dense", "compiled", "pml", "tiled"),
    device: str = "cpu",
    runs: int = 3,
    *,
    dense_limit_bytes: int | None = None,
    memory: bool = True,
    measured: Callable[[LossRow], None] = lambda row: None,
    skipped: Callable[[str, str], None] = lambda what, why: None,
) -> list[LossRow]:
    """Measure every contender at every size, the dense ones as far as memory goes.

    dense_limit_bytes: bytes that their matrices may take on a CPU; None: half of what is free. memory: measure peak
    memory as well, which takes a process for each row on a CPU. measured, skipped: called after each row, and for
    each contender that does not fit, with the reason.
    """

    def tell(what: str, why: str) -> None:
        print(f"{what}: {why}", flush=True)
        skipped(what, why)

    results = []
    for n in sizes:
        limit = memory_available() // 2 if dense_limit_bytes is None else dense_limit_bytes
        chosen = list(names)
        if device == "cpu" and DENSE_COPIES * n * n * 4 > limit:
            chosen = [name for name in names if name not in DENSE]
            for name in (name for name in names if name in DENSE):
                tell(f"{name}, N {n}, D {d}", f"its matrices would take more than {limit / 2**30:.1f} GiB")
        for row in _measure_size(n, d, chosen, device, runs, memory, tell):
            print(line(row), flush=True)
            measured(row)
            results.append(row)
    return results


def _measure_size(
    n: int, d: int, names: Sequence[str], device: str, runs: int, memory: bool, tell: Callable[[str, str], None]
) -> Iterator[LossRow]:
    """The rows of one size, measured in rounds of all contenders."""
    z, labels = make_batch(n, d, device)
    losses = {name: contender(name) for name in names}
    times: dict[str, list[CallTime]] = {name: [] for name in names}
    values: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    baseline: Tensor | None = None
    for turn in range(runs + 1):  # the first round is the warm-up: compilation, tuning, new pages
        for name, loss in list(losses.items()):
            try:
                taken, values[name] = one_call(name, loss, z, labels)
            except torch.OutOfMemoryError:
                del losses[name]
                z.grad = None
                torch.cuda.empty_cache()
                tell(f"{name}, N {n}, D {d}", "out of memory")
                continue
            assert z.grad is not None
            if turn == 0:
                errors[name] = None if baseline is None else float((z.grad - baseline).norm() / baseline.norm())
                baseline = z.grad.clone() if baseline is None else baseline
            else:
                times[name].append(taken)
    for name, loss in losses.items():
        try:
            waits = host_waits(partial(_forward_backward, loss, z, labels), torch.device(device))
            z.grad = None
            extra = peak_extra(name, loss, n, d, device) if memory else None
        except torch.OutOfMemoryError:
            waits = extra = None
            tell(f"{name}, N {n}, D {d}, peak memory", "out of memory")
        # the best run: the others also measure what else runs on the machine
        ordered = sorted(times[name], key=lambda t: t.total)
        best, totals = ordered[0], [t.total for t in ordered]
        yield LossRow(
            name, n, d, best.total, best.forward, best.backward, min(t.host for t in ordered), waits,
            statistics.median(totals), totals[-1], runs, extra,
            6 * n * n * d / best.total / 1e12, values[name], errors[name],
        )  # fmt: skip


def line(row: LossRow) -> str:
    extra = "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:9.1f} MiB  "
    return (
        f"{row.name:>16} N {row.n:>7} D {row.d:>5}  {row.seconds:9.4f} s (median {row.seconds_median:.4f})  {extra}"
        f"{row.tflops:8.3f} TFLOP/s  {row.seconds / row.n / row.n * 1e9:7.3f} ns/pair  loss {row.loss:.6f}"
    )


def plot(results: Sequence[LossRow], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(r.name for r in results):
        mine = [r for r in results if r.name == name]
        axes[0].plot([r.n for r in mine], [r.seconds for r in mine], marker="o", label=name)
        extra = [(r.extra_bytes or 0) / 2**20 for r in mine]
        axes[1].plot([r.n for r in mine], extra, marker="o", label=name)
    for axis, title in zip(axes, ("seconds, forward + backward", "peak extra memory, MiB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="rows N", title=title)
        sizes = sorted({r.n for r in results})
        axis.set_xticks(sizes, labels=[f"{n:,}" for n in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def measure(
    sizes: Sequence[int], d: int, names: Sequence[str], device: str, runs: int, threads: int, tag: str, out: Path
) -> None:
    """Run, print, and write out/DATE-loss-DEVICE[TAG].json and .png. Raises ConfigError, MissingExtra."""
    torch.set_num_threads(threads)
    for name in names:
        contender(name)  # raises for an unknown name or a missing package, before minutes of measuring
    about = machine(device)
    print(f"{about['device']}, {about['threads']} threads, matmul {about['matmul_tflops']:.3f} TFLOP/s")
    results = run(sizes, d, names, device, runs)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{date.today().isoformat()}-loss-{device}{tag}"
    text = json.dumps({"machine": about, "results": [asdict(r) for r in results]}, indent=1)
    stem.with_suffix(".json").write_text(text + "\n")
    plot(results, stem.with_suffix(".png"))
    print(f"written: {stem}.json, {stem}.png")
