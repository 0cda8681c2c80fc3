"""Time of the scores of an embedding (hpc_supcon.evaluation.embedding_scores), beside libraries that compute some.

    python benchmarks/embedding_scores.py [--rows 20000] [--dim 128] [--classes 10 100] [--ranks 2] [--json OUT.json]

Rows are random around a center of their class. Each figure is the best of the rounds, in seconds: of the clock, and
of processors (the sum over the process's threads), which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.metrics import silhouette_score
from torch import Tensor

from hpc_supcon.bench.common import machine
from hpc_supcon.evaluation.embedding_scores import _Embedding, embedding_scores

ROUNDS = 2
LIBRARY_ROWS = 5000
"""The libraries store all pairs, or sort them in full."""


def rows_around_centers(n: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centers = torch.randn(classes, dim, generator=generator)
    return torch.randn(n, dim, generator=generator) + 0.5 * centers[labels], labels


def seconds(call: Callable[[], object], rounds: int = ROUNDS) -> dict[str, float]:
    """The best of the rounds."""
    found: dict[str, list[float]] = {"clock": [], "processors": []}
    for _ in range(rounds):
        clock, processors = time.perf_counter(), time.process_time()
        call()
        found["clock"].append(time.perf_counter() - clock)
        found["processors"].append(time.process_time() - processors)
    return {name: round(min(values), 2) for name, values in found.items()}


def parts(n: int, dim: int, classes: int) -> dict[str, Any]:
    """Of one process."""
    x, labels = rows_around_centers(n, dim, classes)
    embedding = _Embedding(x, labels)
    return {
        "retrieval, uniformity, silhouette": seconds(embedding._of_own_chunks),
        "k-means, five restarts": seconds(lambda: embedding._clustering(0), 1),
        "effective rank": seconds(embedding._effective_rank),
        "alignment, intra_inter": seconds(embedding._pair_means),
        "all scores": seconds(lambda: embedding_scores(x, labels, seed=0), 1),
    }


def libraries(dim: int, classes: int) -> dict[str, Any]:
    """The same scores of LIBRARY_ROWS rows by pytorch-metric-learning and scikit-learn, and by this package."""
    x, labels = rows_around_centers(LIBRARY_ROWS, dim, classes)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    knn = CustomKNN(CosineSimilarity())
    calculator = AccuracyCalculator(include=names, k="max_bin_count", knn_func=knn, device=torch.device("cpu"))
    ours = embedding_scores(x, labels, seed=0)
    theirs = calculator.get_accuracy(x, labels)
    pairs = zip(("recall_at_1", "r_precision", "map_at_r"), names, strict=True)
    differences = {name: abs(ours[name] - theirs[other]) for name, other in pairs}
    silhouette = silhouette_score(x.double().numpy(), labels.numpy(), metric="cosine")
    return {
        "rows": LIBRARY_ROWS,
        "ours": seconds(_Embedding(x, labels)._of_own_chunks),
        "pytorch-metric-learning": seconds(lambda: calculator.get_accuracy(x, labels)),
        "scikit-learn, silhouette": seconds(lambda: silhouette_score(x.numpy(), labels.numpy(), metric="cosine")),
        "differences": differences | {"silhouette": abs(ours["silhouette"] - silhouette)},
    }


def one_rank(rank: int, ranks: int, port: int, arguments: tuple[int, int, int], out: str) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    x, labels = rows_around_centers(*arguments)
    own = slice(0, 0) if rank == 0 else slice((rank - 1) * len(x) // (ranks - 1), rank * len(x) // (ranks - 1))
    found: list[Any] = []
    taken = seconds(lambda: found.append(embedding_scores(x[own], labels[own], seed=0)), 1)
    if rank == 0:
        Path(out).write_text(json.dumps({"seconds of rank 0": taken, "scores": found[-1]}))
    dist.destroy_process_group()


def over_ranks(ranks: int, arguments: tuple[int, int, int], out: str) -> dict[str, Any]:
    """All scores on several ranks, of which the first has no row."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(one_rank, (ranks, port, arguments, out), nprocs=ranks)
    found = json.loads(Path(out).read_text())
    Path(out).unlink()
    one = embedding_scores(*rows_around_centers(*arguments), seed=0)
    return {"seconds of rank 0": found["seconds of rank 0"], "equal to one process": found["scores"] == one}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine("cpu"), "threads": torch.get_num_threads(), "load": os.getloadavg()}
    for classes in options.classes:
        arguments = (options.rows, options.dim, classes)
        found[f"{options.rows} x {options.dim}, {classes} classes"] = parts(*arguments)
        for ranks in options.ranks:
            name = f"{ranks} ranks, {options.rows} x {options.dim}, {classes} classes"
            found[name] = over_ranks(ranks, arguments, f"{options.json or 'embedding-scores'}.part")
    found["libraries"] = libraries(options.dim, options.classes[0])
    found["load at the end"] = os.getloadavg()
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
