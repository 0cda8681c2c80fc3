"""The objectives of the published tables side by side on one protocol: mean test accuracy, paired differences.

    python benchmarks/rivals.py --cifar10 FOLDER --mnist FOLDER --hours 1 -o results.json
    python benchmarks/rivals.py --cifar10 FOLDER --group views -o results.json
    python benchmarks/rivals.py --cifar10 FOLDER --mnist FOLDER --report -o results.json

All train the same encoder on the same images with the same augmentation, batches, optimizer (AdamW, one cycle) and
number of views through the encoder, cross-entropy included; a linear layer on the frozen features is then trained
alike. The learning rate of each is the one of RATES with the best validation accuracy, in a third of the epochs, with
a seed of its own; beyond the lowest or the highest two more are tried. What differs are the loss and the head that it
is published with. A seed draws images, weights, views and order, so that methods are compared in pairs of one seed.

Every run is a cell of a grid under `--runs`: what is done is not repeated, what was interrupted goes on. With
`--hours` the command stops in time, and says what is left.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_data import parser_of_real_data

from hpc_supcon.config import yaml12
from hpc_supcon.environment import code_commit
from hpc_supcon.grid import folder as grid_folder
from hpc_supcon.grid.tables import results_of
from hpc_supcon.pages.statistics import mean_and_interval, paired_difference

RATES = (1e-3, 3e-3, 1e-2)
BEYOND = {"lower": (1e-4, 3e-4), "higher": (3e-2, 1e-1)}
STAGES = ("tuning", *BEYOND, "runs")
TUNING_SEED = 100
NEVER = 1e9
"""Hours: without a limit."""

RAW = {"model.projection_layers": 3, "model.projection_norm": "hidden", "model.projection_dim": 512}
# group -> (seeds, method -> settings). Widths of heads are the published ones, as far as this encoder allows.
GROUPS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "labels": (
        5,
        {
            "cross-entropy": {"loss.name": "cross_entropy"},
            "SupCon out": {"loss.name": "supcon_out"},
            "SupCon in": {"loss.name": "supcon_in"},
            "TCL": {"loss.name": "tcl", "loss.k1": 5000, "loss.k2": 1},
        },
    ),
    "views": (
        3,
        {
            "DINO": {
                "loss.name": "dino", "loss.prototypes": 1024, "loss.frozen_epochs": 1,
                "loss.teacher_warmup_epochs": 4, "model.projection_layers": 3, "model.projection_activation": "gelu",
                "model.momentum_encoder": 0.99, "model.momentum_final": 1.0,
            },
            "SimCLR": {"loss.name": "simclr", "loss.temperature": 0.2},
            "MoCo v2": {
                "loss.name": "moco_v2", "loss.temperature": 0.2, "loss.queue_size": 4096,
                "model.momentum_encoder": 0.99, "model.momentum_final": 0.999,
            },
            "BYOL": {
                "loss.name": "byol", "model.projection_norm": "hidden", "model.predictor_hidden": 256,
                "model.momentum_encoder": 0.99, "model.momentum_final": 1.0,
            },
            "SimSiam": {
                "loss.name": "simsiam", "model.projection_layers": 3, "model.projection_norm": "all",
                "model.predictor_hidden": 64,
            },
            "Barlow Twins": {**RAW, "loss.name": "barlow_twins", "loss.redundancy_weight": 0.005},
            "VICReg": {**RAW, "loss.name": "vicreg"},
            "SwAV": {
                "loss.name": "swav", "model.projection_norm": "hidden", "loss.prototypes": 300,
                "loss.frozen_epochs": 1,
            },
            "TCL without labels": {
                "loss.name": "tcl", "loss.supervised": False, "loss.temperature": 0.2, "loss.k1": 1, "loss.k2": 1.5,
            },
        },
    ),
}  # fmt: skip
CLAIMS = (
    ("SupCon out", "TCL"),
    ("cross-entropy", "SupCon out"),
    ("cross-entropy", "TCL"),
    ("SupCon out", "SupCon in"),
)
"""(a, b): is b above a?"""

COMMON: dict[str, Any] = {
    "data.batch_size": 256,
    "data.views": 2,
    "data.validation_fraction": 0.1,
    "augment.crop_scale": [0.4, 1.0],
    "model.projection_hidden": 256,
    "optim.name": "adamw",
    "optim.weight_decay": 1e-2,
    "optim.schedule": "one_cycle",
    "probe.linear.epochs": 20,
    "probe.embedding": False,
    "log.to": [],
    "log.progress": False,
}


@dataclass(frozen=True)
class DataSet:
    """epochs: of a run; those of tuning are a third."""

    name: str
    settings: Mapping[str, Any]
    epochs: int


@dataclass(frozen=True)
class Grid:
    """One grid: one of STAGES of a group of methods."""

    data: DataSet
    group: str
    stage: str

    @property
    def name(self) -> str:
        suffix = {"tuning": "-tuning", "runs": ""}.get(self.stage, f"-tuning-{self.stage}")
        return f"rivals-{self.data.name.lower()}-{self.group}{suffix}"

    def of(self, stage: str) -> Grid:
        return dataclasses.replace(self, stage=stage)

    @property
    def rates(self) -> tuple[float, ...]:
        """What is tried; () for runs."""
        return {"tuning": RATES, "runs": (), **BEYOND}[self.stage]

    def specification(self, rates: Mapping[str, float], precision: str) -> dict[str, Any]:
        """The grid file of these methods. rates: the learning rate of each, for runs."""
        seeds, methods = GROUPS[self.group]
        own = {name: methods[name] for name in rates}
        tuning = self.stage != "runs"
        epochs = max(1, self.data.epochs // 3) if tuning else self.data.epochs
        settings = {**COMMON, **self.data.settings, "train.epochs": epochs, "train.precision": precision}
        settings["optim.warmup_epochs"] = epochs / 6
        if tuning:
            axes: dict[str, Any] = {"method": own, "optim.lr": list(self.rates)}
        else:
            axes = {"method": {name: {**one, "optim.lr": rates[name]} for name, one in own.items()}}
        return {
            "name": self.name, "base": "default", "set": settings, "axes": axes,
            "seeds": [TUNING_SEED] if tuning else seeds,
        }  # fmt: skip


def data_sets(arguments: argparse.Namespace) -> list[DataSet]:
    found = []
    if arguments.cifar10:
        own = {"data.source": "image_folder", "data.train_images": 10_000, "model.encoder": "resnet9_small"}
        found.append(DataSet("CIFAR-10", {**own, "data.root": arguments.cifar10}, epochs=12))
    if arguments.mnist:
        own = {"data.source": "mnist", "model.encoder": "conv", "augment.flip": 0.0}
        found.append(DataSet("MNIST", {**own, "data.root": arguments.mnist}, epochs=3))
    return found


def grids(sets: Sequence[DataSet], groups: Sequence[str] = tuple(GROUPS)) -> Iterator[Grid]:
    """In the order in which they run: the methods with labels on every data set first."""
    for group, data, stage in itertools.product(groups, sets, STAGES):
        yield Grid(data, group, stage)


def submit(grid: Grid, specification: Mapping[str, Any], root: Path, seconds: float) -> bool:
    """Run what is missing of a grid, for at most this long; whether the time was enough."""
    path = root / f"{grid.name}.yaml"
    path.write_text(yaml12.dumps(specification), encoding="utf-8")
    line = [sys.executable, "-m", "hpc_supcon", "grid", "submit", str(path), "--cluster", "local"]
    process = subprocess.Popen([*line, "--dir", str(root / grid.name)])
    try:
        if process.wait(seconds if seconds < NEVER else None):
            raise SystemExit(f"{grid.name}: some runs failed; see hpc-supcon grid status {root / grid.name}")
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        return False
    return True


def accuracies(grid: Grid, root: Path, split: str) -> dict[tuple[str, str], dict[int, float]]:
    """(method, learning rate or "") -> seed -> accuracy, of the runs that are done."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    if (root / grid.name / "grid.json").exists():
        frozen = grid_folder.load(root / grid.name)
        for cell in frozen.cells:
            key = (cell.labels["method"], cell.labels.get("optim.lr", ""))
            for result in results_of(frozen, cell):
                number = result.numbers["accuracy" if split == "test" else f"{split} accuracy"]
                found.setdefault(key, {})[cell.seed] = number
    return found


def tuning_scores(grid: Grid, root: Path, stages: Sequence[str] = STAGES[:-1]) -> dict[str, dict[float, float]]:
    """Method -> learning rate -> validation accuracy, as far as these stages have tried it."""
    scores: dict[str, dict[float, float]] = {}
    for stage in stages:
        for (method, rate), seeds in accuracies(grid.of(stage), root, "validation").items():
            scores.setdefault(method, {})[float(rate)] = max(seeds.values())
    return scores


def best_rates(grid: Grid, root: Path, stages: Sequence[str]) -> dict[str, float]:
    """The learning rate with the best validation accuracy of these stages, of each method that has tried RATES."""
    scores = tuning_scores(grid, root, stages)
    tried = {method: scores.get(method, {}) for method in GROUPS[grid.group][1]}
    return {
        method: max(found, key=lambda rate: found[rate]) for method, found in tried.items() if {*RATES} <= {*found}
    }


def methods_of(grid: Grid, root: Path) -> dict[str, float]:
    """What a grid runs: method -> its learning rate as far as it is known."""
    if grid.stage == "tuning":
        return dict.fromkeys(GROUPS[grid.group][1], 0.0)
    if grid.stage == "runs":
        return best_rates(grid, root, STAGES[:-1])
    end = RATES[0] if grid.stage == "lower" else RATES[-1]
    return {method: rate for method, rate in best_rates(grid, root, ["tuning"]).items() if rate == end}


def run_all(sets: Sequence[DataSet], groups: Sequence[str], root: Path, hours: float, precision: str) -> None:
    end = time.monotonic() + 3600 * hours
    for grid in grids(sets, groups):
        methods = methods_of(grid, root)
        if methods and not submit(grid, grid.specification(methods, precision), root, end - time.monotonic()):
            return


def left(sets: Sequence[DataSet], groups: Sequence[str], root: Path) -> list[str]:
    """One line for each grid that is not done."""
    lines = []
    for grid in grids(sets, groups):
        seeds, every = GROUPS[grid.group]
        expected = len(every) * seeds if grid.stage == "runs" else len(methods_of(grid, root)) * len(grid.rates)
        done = sum(len(s) for s in accuracies(grid, root, "test").values())
        if done < expected:
            lines.append(f"left: {expected - done} of {expected} runs of {grid.name}")
    return lines


def result(data: DataSet, root: Path) -> dict[str, Any]:
    """The numbers of one data set."""
    methods, test = {}, {}
    for group in GROUPS:
        grid = Grid(data, group, "runs")
        rates, tuning = methods_of(grid, root), tuning_scores(grid, root)
        for (method, _), seeds in accuracies(grid, root, "test").items():
            test[method] = seeds
            methods[method] = {
                "lr": rates[method],
                "tuning": tuning[method],
                "test": seeds,
                "interval": mean_and_interval(list(seeds.values())),
            }
    ranked = sorted(test, key=lambda name: -methods[name]["interval"][0])
    pairs = [(a, b) for a, b in CLAIMS if a in test and b in test]
    pairs += [(b, a) for a, b in itertools.pairwise(ranked) if (a, b) not in pairs and (b, a) not in pairs]
    differences = [{"from": a, "to": b, "difference": paired_difference(test[a], test[b])} for a, b in pairs]
    return {"data": data.name, "methods": {name: methods[name] for name in ranked}, "differences": differences}


def verdict(difference: tuple[float, float, int] | None) -> str:
    if difference is None or difference[2] < 2:
        return "too few seeds"
    mean, half, _ = difference
    return "not separated" if abs(mean) <= half else "above" if mean > 0 else "below"


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for one in found:
        lines += [f"## {one['data']}", "", "| method | test accuracy | seeds | learning rate |", "|---|---|---|---|"]
        for name, row in one["methods"].items():
            mean, half = row["interval"]
            edge = " (the last one tried)" if row["lr"] in (BEYOND["lower"][0], BEYOND["higher"][-1]) else ""
            lines.append(f"| {name} | {mean:.4f} ± {half:.4f} | {len(row['test'])} | {row['lr']:g}{edge} |")
        lines += ["", "| difference of pairs of one seed | mean ± 95 % interval | pairs | |", "|---|---|---|---|"]
        for pair in one["differences"]:
            mean, half, count = pair["difference"] or (0.0, 0.0, 0)
            text = f"{mean:+.4f} ± {half:.4f} | {count} | {verdict(pair['difference'])}"
            lines.append(f"| {pair['to']} - {pair['from']} | {text} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of_real_data(__doc__, "runs/rivals")
    parser.add_argument("--group", choices=GROUPS, action="append", help="run these methods alone; else all")
    parser.add_argument(
        "--hours", type=float, default=NEVER, help="stop after this time; go on with the same command"
    )
    parser.add_argument("--precision", default="auto", help="train.precision; bf16 is faster on some CPUs")
    parser.add_argument("--report", action="store_true", help="only write what is done")
    arguments = parser.parse_args()
    sets = data_sets(arguments)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    groups = arguments.group or tuple(GROUPS)
    if not arguments.report:
        run_all(sets, groups, arguments.runs, arguments.hours, arguments.precision)
    found = [result(data, arguments.runs) for data in sets]
    facts = {
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "commit": code_commit(),
        "precision": arguments.precision,
    }  # fmt: skip
    arguments.output.write_text(json.dumps({**facts, "results": found}, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(markdown(found))
    print(markdown(found))
    print("\n".join(left(sets, groups, arguments.runs)))


if __name__ == "__main__":
    main()
