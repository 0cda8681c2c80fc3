"""The results of the loaders' benchmark, and their plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoaderRow:
    """One loader at one batch size and number of workers: images/s of the best and the worst of `rounds` rounds.

    cpu_ms_per_image: CPU time of all processes together, which hardly depends on what else runs on the machine.
    """

    data: str
    name: str
    batch_size: int
    workers: int
    images_per_s: float
    images_per_s_worst: float
    cpu_ms_per_image: float
    rounds: int


def plot(results: Sequence[LoaderRow], path: Path) -> None:
    """One panel for each data set; a line, or for a single batch size a bar, for each contender and worker number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    labels, names = (list(dict.fromkeys(values)) for values in zip(*((r.data, r.name) for r in results), strict=True))
    counts = sorted({r.workers for r in results})
    figure, axes = plt.subplots(1, len(labels), figsize=(5.8 * len(labels), 4.4), layout="constrained", squeeze=False)
    for axis, label in zip(axes[0], labels, strict=True):
        own = [r for r in results if r.data == label]
        sizes = sorted({r.batch_size for r in own})
        axis.set_title(f"{label}: images/s, two views each")
        lines = [(n, w, [r for r in own if (r.name, r.workers) == (n, w)]) for n in names for w in counts]
        lines = [(n, w, sorted(line, key=lambda r: r.batch_size)) for n, w, line in lines if line]
        if len(sizes) == 1:
            called = [f"{n}, {w} workers" if len(counts) > 1 else n for n, w, _ in lines]
            bars = axis.barh(called[::-1], [line[0].images_per_s for _, _, line in lines][::-1])
            axis.bar_label(bars, fmt="{:,.0f}", padding=3)
            axis.margins(x=0.18)
            continue
        for name, workers, line in lines:
            style = {"color": f"C{names.index(name)}", "linestyle": "-" if workers == counts[-1] else "--"}
            x, y = [r.batch_size for r in line], [r.images_per_s for r in line]
            axis.plot(x, y, marker="o", label=f"{name}, {workers}", **style)
        axis.set(xscale="log", yscale="log", xlabel="batch size")
        axis.set_xticks(sizes, labels=[str(n) for n in sizes])
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend(
            title="loader, workers", fontsize="small", handlelength=3.5, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    figure.savefig(path, dpi=120)
    plt.close(figure)
