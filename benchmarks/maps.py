"""How long a map takes: PCA, t-SNE and UMAP of clustered points, and how far it keeps neighbors.

    python benchmarks/maps.py [--points 2000 10000] [--dims 128] [--methods pca tsne] [-o results.json]

The points are those of ten classes with 128 numbers each, as the output of a projection head. Time is told on the
clock and of the processor: on a machine that others use, the second is the one that can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hpc_supcon.evaluation.maps import METHODS, FitOptions, Points, fit_map

CLASSES = 10
SPREAD = 0.1
"""Of a class around its mean, in each direction, of points of length 1."""


def clustered(n: int, width: int) -> torch.Tensor:
    """float [n, width] of length 1."""
    generator = torch.Generator().manual_seed(0)
    means = F.normalize(torch.randn(CLASSES, width, generator=generator), dim=1)
    return F.normalize(means[torch.arange(n) % CLASSES] + SPREAD * torch.randn(n, width, generator=generator), dim=1)


def measured(method: str, n: int, width: int) -> dict[str, Any]:
    x = clustered(n, width)
    began, processor = time.perf_counter(), time.process_time()
    points = Points(x)
    mapped = fit_map(method, points, FitOptions(seed=0))
    row = {"method": method, "points": n, "dims": width, "seconds": time.perf_counter() - began}
    row |= {"cpu_seconds": time.process_time() - processor, "load": os.getloadavg()[0]}
    return row | {"trustworthiness": points.trustworthiness(mapped)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", default=[2000, 10_000])
    parser.add_argument("--dims", type=int, default=128)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["pca", "tsne"])
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    for method in options.methods:
        measured(method, 50, options.dims)  # imports and compiles
    print("| method | points | seconds | of the processor | trustworthiness | load |\n|---|---|---|---|---|---|")
    rows = []
    for n in options.points:
        for method in options.methods:
            rows.append(row := measured(method, n, options.dims))
            print(
                f"| {method} | {n:,} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | "
                f"{row['trustworthiness']:.3f} | {row['load']:.1f} |",
                flush=True,
            )
    if options.out is not None:
        facts = {"cpus": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__, "rows": rows}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
