"""Every objective side by side on small real data: test accuracy of one encoder, mean and spread over seeds.

    python benchmarks/objectives.py --mnist FOLDER --cifar10 FOLDER -o results.json

All share encoder, optimizer (AdamW), batch size, the number of images that pass through the encoder in training (an
image with two views counts twice) and the validation split. The learning rate of each is tuned on seed 0 by
validation accuracy, on 5,000 images; then each seed trains with it. A run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_data import parser_of_real_data

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
TUNING_IMAGES = 5_000


@dataclass(frozen=True)
class Method:
    """One row: what is set, which setting the learning rate is, and how many views an image has."""

    name: str
    settings: tuple[str, ...]
    views: int = 1
    rate: tuple[str, ...] = ("optim.lr",)
    rates: tuple[float, ...] = RATES
    share: float = 1.0
    """Of the training images' budget that pre-training gets."""


@dataclass(frozen=True)
class DataSet:
    name: str
    settings: tuple[str, ...]
    passes: int
    """Passes of the training images through the encoder."""


SOFTMAX = ("probe.kind=softmax", "probe.softmax.schedule=cosine", "probe.softmax.evaluate_every=50")
METHODS = (
    Method("softmax regression on pixels", SOFTMAX, rate=("probe.softmax.lr",)),
    Method("cross-entropy", ("loss.name=cross_entropy",)),
    Method("cross-entropy + MAE", ("loss.name=cross_entropy_mae",)),
    Method(
        "autoencoder, frozen, 3-layer classifier",
        ("loss.name=reconstruction", "augment.policy=none", "probe.kind=mlp"),
    ),
    Method("triplet, linear", ("loss.name=triplet",)),
    Method("SupCon in, linear", ("loss.name=supcon_in",), views=2),
    Method("SupCon out, linear", ("loss.name=supcon_out",), views=2),
    Method("TCL, linear", ("loss.name=tcl",), views=2),
    Method(
        "SupCon out, half the budget, then fine-tuned",
        ("loss.name=supcon_out", "optim.lr=3e-3", "probe.kind=finetune"),
        views=2,
        rate=("probe.finetune.lr", "probe.finetune.encoder_lr"),
        share=0.5,
    ),
)
COMMON = (
    "model.encoder=conv", "model.projection_hidden=128", "data.batch_size=256", "optim.name=adamw",
    "optim.weight_decay=1e-4", "optim.warmup_epochs=0.5", "log.tensorboard=false", "log.progress=false",
    "runtime.threads=1", "probe.linear.epochs=20", "probe.mlp.epochs=20", "checkpoint.every_epochs=null",
)  # fmt: skip


def data_sets(arguments: argparse.Namespace) -> list[DataSet]:
    found = []
    crop = "augment={policy: flip_crop, crop_scale: [0.5, 1.0]"
    if arguments.mnist:
        settings = ("data.source=mnist", f"data.root={arguments.mnist}", f"{crop}, flip: 0.0}}")
        found.append(DataSet("MNIST", settings, passes=6))
    if arguments.cifar10:
        settings = (
            "data.source=image_folder",
            f"data.root={arguments.cifar10}",
            f"{crop}}}",
            "data.train_images=5000",
        )
        found.append(DataSet("CIFAR-10, 5,000 images", settings, passes=8))
    return found


def command(data: DataSet, method: Method, rate: float, seed: int, folder: Path, tuning: bool) -> list[str]:
    epochs = max(1, round(data.passes * method.share / method.views))
    settings = [*data.settings, *COMMON, *method.settings, *(f"{name}={rate}" for name in method.rate)]
    settings += [f"data.views={method.views}", f"train.epochs={epochs}", f"seed={seed}", f"run_dir={folder}"]
    if method.share < 1:
        settings.append(f"probe.finetune.epochs={max(1, round(data.passes * (1 - method.share)))}")
    if tuning:
        settings.append(f"data.train_images={TUNING_IMAGES}")
    return [sys.executable, "-m", "hpc_supcon", "run", "default", *settings]


def run(data: DataSet, method: Method, rate: float, seed: int, root: Path, *, tuning: bool = False) -> dict[str, Any]:
    """The entry of results.json; trained now unless it is there."""
    label = "".join(c if c.isalnum() else "-" for c in f"{data.name} {method.name} {rate} {seed}{' tune' * tuning}")
    folder = root / label
    if not (folder / "results.json").exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        line = [*command(data, method, rate, seed, folder, tuning), *(["--resume"] if folder.exists() else [])]
        done = subprocess.run(line, check=False, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{label}: {done.stderr.strip()}")
    entries = json.loads((folder / "results.json").read_text())["results"]
    return next(entry for entry in entries if entry["stage"] == "probe")


def compare(sets: Sequence[DataSet], root: Path, jobs: int) -> list[dict[str, Any]]:
    rows = []
    with ThreadPoolExecutor(jobs) as pool:
        for data in sets:
            tuned = {(m, r): pool.submit(run, data, m, r, 0, root, tuning=True) for m in METHODS for r in m.rates}
            best = {m: max(m.rates, key=lambda r: tuned[m, r].result()["validation"]["accuracy"]) for m in METHODS}
            trained = {(m, s): pool.submit(run, data, m, best[m], s, root) for m in METHODS for s in SEEDS}
            for method in METHODS:
                entries = [trained[method, seed].result() for seed in SEEDS]
                test = [entry["test"]["accuracy"] for entry in entries]
                row = {"data": data.name, "method": method.name, "lr": best[method], "test": test}
                rows.append({**row, "mean": statistics.mean(test), "sd": statistics.stdev(test)})
                print(f"{data.name}: {method.name}: {row['test']} (lr {best[method]})", flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["data"] for row in rows))
    cells = {(row["data"], row["method"]): f"{row['mean']:.4f} ± {row['sd']:.4f}" for row in rows}
    lines = [f"| test accuracy, 3 seeds | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {m.name} | {' | '.join(cells.get((name, m.name), '') for name in names)} |" for m in METHODS]
    return "\n".join(lines)


def main() -> None:
    parser = parser_of_real_data(__doc__, "runs/objectives")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    arguments = parser.parse_args()
    rows = compare(data_sets(arguments), arguments.runs, arguments.jobs)
    facts = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    arguments.output.write_text(json.dumps({**facts, "seeds": SEEDS, "rows": rows}, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
