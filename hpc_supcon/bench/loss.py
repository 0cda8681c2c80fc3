"""Time and peak extra memory of one contrastive loss, forward + backward: this package against the alternatives.

    hpc-supcon bench loss --size 4096 --size 8192 --only dense --only tiled

Contenders: `dense` (SupContrast's loss in plain PyTorch), `compiled` (the same under torch.compile), `pml`
(pytorch-metric-learning), and the backends of hpc_supcon. Times are measured in rounds of all contenders in one
process, so that drift of the machine affects all of them; CPU memory is measured in a new process for each, as the
peak resident set minus that before the call. Extra memory is everything except the features, including the gradient.
Writes JSON and PNG.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingExtra
from ..losses import SupConLoss
from .common import machine, resident, synchronize

TEMPERATURE = 0.1
CLASSES = 100
DENSE_COPIES = 10
"""About the number of fp32 N x N matrices that the dense contenders hold at their peak; sizes above the memory limit
are skipped."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""(features [N, D], labels [N]) -> loss."""


def dense_supcon(z: Tensor, labels: Tensor) -> Tensor:
    """SupCon "out" as SupContrast computes it: with full matrices, and the row maximum subtracted."""
    z = torch.nn.functional.normalize(z, dim=1)
    mask = torch.eq(labels[:, None], labels[None, :]).float()
    logits = z @ z.T / TEMPERATURE
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = torch.ones_like(mask).fill_diagonal_(0)
    mask = mask * others
    log_prob = logits - torch.log((torch.exp(logits) * others).sum(1, keepdim=True))
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


def contender(name: str) -> Loss:
    if name == "dense":
        return dense_supcon
    if name == "compiled":
        return torch.compile(dense_supcon)
    if name == "pml":
        try:
            from pytorch_metric_learning.losses import SupConLoss as PmlLoss
        except ModuleNotFoundError:
            raise MissingExtra("pml is pytorch-metric-learning: pip install 'hpc-supcon[dev]'") from None
        return PmlLoss(temperature=TEMPERATURE)
    backend, _, precision = name.partition("-")
    return SupConLoss(TEMPERATURE, backend=backend, precision=precision or "auto")


@dataclass(frozen=True)
class LossRow:
    """The measurement of one contender at one size, forward + backward."""

    name: str
    n: int
    d: int
    seconds: float
    """The best of `runs`."""
    seconds_median: float
    seconds_worst: float
    runs: int
    extra_bytes: int
    """Peak memory without the features."""
    tflops: float
    """6 N^2 D / seconds: as if every contender did the arithmetic of three dense matmuls."""
    loss: float
    gradient_error: float | None
    """Relative difference from the first contender of the same size; None for that one."""


def make_batch(n: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, d, device=device, requires_grad=True), torch.arange(n, device=device) % CLASSES


def one_call(loss: Loss, z: Tensor, labels: Tensor) -> tuple[float, float]:
    """(seconds, value) of forward + backward; replaces z.grad."""
    z.grad = None
    synchronize(z)
    start = time.perf_counter()
    value = loss(z, labels)
    value.backward()
    synchronize(z)
    return time.perf_counter() - start, float(value.detach())


def _cpu_memory(name: str, n: int, d: int, threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    loss = contender(name)
    one_call(loss, *make_batch(CLASSES * 2, d, "cpu"))  # libraries allocate some memory once, which is not the loss's
    if name == "compiled":
        one_call(loss, *make_batch(n, d, "cpu"))
    z, labels = make_batch(n, d, "cpu")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    one_call(loss, z, labels)
    answer.put(resident("VmHWM") - before)


def peak_extra(name: str, n: int, d: int, device: str) -> int:
    """Peak bytes of one forward + backward, without the batch itself."""
    if device == "cpu":
        context = multiprocessing.get_context("spawn")
        answer = context.Queue()
        child = context.Process(target=_cpu_memory, args=(name, n, d, torch.get_num_threads(), answer))
        child.start()
        extra = answer.get(timeout=1800)
        child.join()
        return int(extra)
    loss = contender(name)
    z, labels = make_batch(n, d, device)
    one_call(loss, z, labels)
    z.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one_call(loss, z, labels)
    return torch.cuda.max_memory_allocated() - before


def run(
    sizes: Sequence[int],
    d: int = 128,
    names: Sequence[str] = ("dense", "compiled", "pml", "tiled"),
    device: str = "cpu",
    runs: int = 3,
    dense_limit_bytes: int = 4 << 30,
) -> list[LossRow]:
    """Measure every contender at every size, except the dense ones where their matrices exceed the limit."""
    results = []
    for n in sizes:
        fits = DENSE_COPIES * n * n * 4 <= dense_limit_bytes
        chosen = [name for name in names if fits or name not in ("dense", "compiled", "pml", "reference")]
        z, labels = make_batch(n, d, device)
        losses = {name: contender(name) for name in chosen}
        times: dict[str, list[float]] = {name: [] for name in chosen}
        values: dict[str, float] = {}
        errors: dict[str, float | None] = {}
        baseline: Tensor | None = None
        for turn in range(runs + 1):  # the first round is the warm-up: compilation, tuning, new pages
            for name, loss in losses.items():
                seconds, values[name] = one_call(loss, z, labels)
                assert z.grad is not None
                if turn == 0:
                    errors[name] = None if baseline is None else float((z.grad - baseline).norm() / baseline.norm())
                    baseline = z.grad.clone() if baseline is None else baseline
                else:
                    times[name].append(seconds)
        for name in chosen:
            # the best run: the others also measure what else runs on the machine
            seconds, median, worst = min(times[name]), statistics.median(times[name]), max(times[name])
            extra = peak_extra(name, n, d, device)
            rate = 6 * n * n * d / seconds / 1e12
            results.append(LossRow(name, n, d, seconds, median, worst, runs, extra, rate, values[name], errors[name]))
            print(
                f"{name:>16} N {n:>7} D {d:>5}  {seconds:9.4f} s (median {median:.4f})  {extra / 2**20:9.1f} MiB  "
                f"{rate:8.3f} TFLOP/s  {seconds / n / n * 1e9:7.3f} ns/pair  loss {values[name]:.6f}"
            )
    return results


def plot(results: Sequence[LossRow], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(r.name for r in results):
        mine = [r for r in results if r.name == name]
        axes[0].plot([r.n for r in mine], [r.seconds for r in mine], marker="o", label=name)
        axes[1].plot([r.n for r in mine], [r.extra_bytes / 2**20 for r in mine], marker="o", label=name)
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
