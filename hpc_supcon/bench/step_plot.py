"""The picture of `hpc-supcon bench step`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..phases import BACKWARD
from ..training.profile import ORDER
from .step_session import Result


def plot(results: Sequence[Result], path: Path) -> None:
    """Views/s and memory over the batch size, and the shares of the phases at each line's best batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    labels = list(dict.fromkeys(r.label for r in results))
    best: list[Result] = []
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


def _draw_shares(axis: object, rows: Sequence[Result]) -> None:
    """A bar for each row, divided among the phases in the colors of one legend."""
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
