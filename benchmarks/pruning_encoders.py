"""Contrastive and cross-entropy encoders under the same one-shot pruning, by the project's own commands.

    python benchmarks/pruning_encoders.py --runs RUNS -o results.json

For each seed and loss: `run` trains and probes an encoder on the handwritten digits of scikit-learn, and `prune`
prunes it by each method to each rate, without fine-tuning; a linear probe is fitted on the features of each. `--loss`
and `--seed` choose some of them, so that parts can run side by side: the table is of every run that is in RUNS.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from hpc_supcon import cli
from hpc_supcon.pages.statistics import mean_and_interval

LOSSES, SEEDS, RATES = ("supcon_out", "cross_entropy"), (0, 1, 2), (0.8, 0.9, 0.95)
METHODS = {
    "random": ["prune.method=random"],
    "l1, layer": ["prune.method=l1", "prune.scope=layer"],
    "l1, global": ["prune.method=l1"],
    "obs_diag": ["prune.method=obs_diag"],
    "obs_block": ["prune.method=obs_block"],
    "fishleg": ["prune.method=fishleg"],
}
TRAINING = [
    "data.source=digits", "model.encoder=conv", "model.projection_hidden=128", "model.projection_dim=64",
    "data.batch_size=128", "train.epochs=40", "checkpoint.every_epochs=40", "optim.lr=0.05", "probe.kind=linear",
    "probe.linear.epochs=30", "probe.linear.lrs=[0.01]", "probe.embedding=false", "report.embeddings=false",
    "report.html=false", "log.tensorboard=false", "log.progress=false", "runtime.threads=1",
]  # fmt: skip


def command(*arguments: object) -> None:
    """Runs one command of hpc-supcon, in this process."""
    print("hpc-supcon", *arguments, flush=True)
    try:
        cli.main([*map(str, arguments)])
    except SystemExit as stopped:
        if stopped.code:
            raise


def measure(folder: Path, loss: str, seed: int) -> None:
    if not (folder / "results.json").exists():
        command("run", "default", f"run_dir={folder}", f"seed={seed}", f"loss.name={loss}",
                *TRAINING)  # fmt: skip
    for settings in METHODS.values():
        command("prune", folder, *settings, f"prune.rate=[{', '.join(map(str, RATES))}]", "--resume")


def accuracies(runs: Path, loss: str) -> dict[tuple[str, float], list[float]]:
    """(method, rate) -> test accuracy of the linear probe for each seed; rate 0: not pruned."""
    found: dict[tuple[str, float], list[float]] = {}
    for folder in sorted(runs.glob(f"{loss}-*")):
        for entry in json.loads((folder / "results.json").read_text())["results"]:
            about: dict[str, Any] = entry.get("prune") or {}
            name = about.get("method", "")
            key = (f"{name}, {about['scope']}" if name == "l1" else name, about.get("rate", 0.0))
            found.setdefault(key, []).append(entry["test"]["accuracy"])
    return found


def table(runs: Path) -> str:
    head = " | ".join(f"{loss}, {rate:.0%}" for loss in LOSSES for rate in RATES)
    lines = [f"| linear-probe accuracy | {head} |", "|---" * (1 + len(LOSSES) * len(RATES)) + "|"]
    by_loss = {loss: accuracies(runs, loss) for loss in LOSSES}
    for name in ("", *METHODS):
        cells = []
        for loss in LOSSES:
            for rate in RATES:
                found = mean_and_interval(by_loss[loss].get((name, rate if name else 0.0), []))
                cells.append(f"{found[0]:.4f} ± {found[1]:.4f}" if found else "")
        lines.append(f"| {name or 'not pruned'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--loss", action="append", choices=LOSSES, help="repeat for several; by default, both")
    parser.add_argument("--seed", type=int, action="append", help="repeat for several; by default 0, 1 and 2")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file; a .md beside it has the table")
    arguments = parser.parse_args()
    for seed in arguments.seed or SEEDS:
        for loss in arguments.loss or LOSSES:
            measure(arguments.runs / f"{loss}-{seed}", loss, seed)
    rows = [
        {"loss": loss, "method": name, "rate": rate, "accuracy": values}
        for loss in LOSSES
        for (name, rate), values in accuracies(arguments.runs, loss).items()
    ]
    facts = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__, "rows": rows}
    arguments.output.write_text(json.dumps(facts, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(table(arguments.runs) + "\n")
    print(table(arguments.runs))


if __name__ == "__main__":
    main()
