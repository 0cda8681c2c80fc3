"""One-shot pruning methods side by side: test loss and accuracy of a small encoder and its classifier on MNIST.

    python benchmarks/pruning_methods.py --mnist FOLDER -o results.json

For each seed, the encoder `conv` with a linear classifier is trained on images halved to 14 px. Its weights are then
removed at once, over all layers together ("layer": the same share of each), without any training afterwards.
Accuracies have the half width of the 95 % interval over seeds (Student's t). obs has the single gradients of 2,048
images, with their own labels; FishLeg has batches of 128 images. A method's damping is that factor of FACTORS, times
the mean of the Fisher matrix's diagonal, with the lowest loss on 2,000 images of train at 90 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.datasets import MNIST

from hpc_supcon.models import build_encoder
from hpc_supcon.pages.statistics import mean_and_interval
from hpc_supcon.pruning import (
    BlockFisher,
    Categorical,
    InverseFisher,
    ModelFisher,
    build_masks,
    mean_diagonal,
    prunable,
    removal_scores,
)

RATES = (0.8, 0.9, 0.95)
FACTORS = (1.0, 0.1, 0.01)
BLOCKS = (1, 64, 256)
TRAIN, TEST, BATCH, SAMPLES, EPOCHS = 20_000, 10_000, 128, 2048, 4
Found = tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], dict[str, Tensor]]]
"""(scores, keep -> all parameters after pruning)"""


def images(folder: str, train: bool, count: int) -> tuple[Tensor, Tensor]:
    data = MNIST(folder, train=train)
    x = (data.data[:count, None].float() / 255 - 0.1307) / 0.3081
    return nn.functional.avg_pool2d(x, 2), data.targets[:count]


class Case:
    """One trained encoder."""

    def __init__(self, seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
        torch.manual_seed(seed)
        self.encoder = build_encoder("conv", in_channels=1, image_size=14)
        self.classifier = nn.Linear(self.encoder.feature_dim, 10)
        self.train_set, self.test_set = train, test
        self._train()
        self.parameters = {name: p.detach() for name, p in self.encoder.named_parameters()}
        self.weights = {name: w.detach() for name, w in prunable(self.encoder).items()}
        self.fisher = ModelFisher(self.parameters, self.outputs, Categorical())
        self.mean = mean_diagonal(self.fisher, self.batch, 32, seed)
        self._learned: dict[tuple[int, float], InverseFisher] = {}

    @cached_property
    def blocks(self) -> dict[int, BlockFisher]:
        fisher = ModelFisher(self.parameters, self.outputs, Categorical(), kind="empirical")
        found = {block: BlockFisher(self.weights, block) for block in BLOCKS}
        for i in range(SAMPLES // BATCH):
            g = fisher.sample_gradients(self.batch(i), torch.Generator())
            for each in found.values():
                each.add({name: g[name] for name in self.weights})
        return found

    def learned(self, steps: int, damping: float) -> InverseFisher:
        if (steps, damping) not in self._learned:
            inverse = self._learned[steps, damping] = InverseFisher(self.encoder, damping=damping)
            inverse.fit(self.fisher, self.batch, steps, seed=0)
        return self._learned[steps, damping]

    def _train(self) -> None:
        x, y = self.train_set
        steps = EPOCHS * (len(x) // BATCH)
        parameters = [*self.encoder.parameters(), *self.classifier.parameters()]
        optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(BATCH)[: steps // EPOCHS]:
                optimizer.zero_grad()
                nn.functional.cross_entropy(self.classifier(self.encoder(x[rows]).relu()), y[rows]).backward()
                optimizer.step()
                schedule.step()
        self.encoder.eval()
        self.classifier.requires_grad_(False)

    def outputs(self, parameters: Any, x: Tensor) -> Tensor:
        return self.classifier(functional_call(self.encoder, parameters, (x,)).relu())

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.train_set[0]), (BATCH,), generator=torch.Generator().manual_seed(index))
        return self.train_set[0][rows], self.train_set[1][rows]

    @torch.no_grad()
    def score(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[float, float]:
        z = self.outputs(parameters, x)
        return float(nn.functional.cross_entropy(z, y)), float((z.argmax(1) == y).double().mean())

    def plain(self, keep: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.where(keep[name], p, 0) if name in keep else p for name, p in self.parameters.items()}


def magnitude(case: Case, damping: float) -> Found:
    return {name: w.abs() for name, w in case.weights.items()}, case.plain


def at_random(case: Case, damping: float) -> Found:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(w.shape, generator=generator) for name, w in case.weights.items()}, case.plain


def obs(block: int) -> Callable[[Case, float], Found]:
    def found(case: Case, damping: float) -> Found:
        inverse = case.blocks[block].inverse(damping)
        scores = removal_scores(case.weights, inverse.diagonal())
        return scores, lambda keep: case.parameters | inverse.compensate(case.weights, keep)

    return found


def fishleg(steps: int, *, joint: bool = True) -> Callable[[Case, float], Found]:
    def found(case: Case, damping: float) -> Found:
        inverse = case.learned(steps, damping)
        scores = removal_scores(case.weights, inverse.diagonal())
        return scores, lambda keep: inverse.compensate(case.parameters, keep, joint=joint)

    return found


METHODS: dict[str, Callable[[Case, float], Found]] = {
    "random": at_random,
    "magnitude, layer": magnitude,
    "magnitude": magnitude,
    **{f"obs, blocks of {block}": obs(block) for block in BLOCKS},
    "FishLeg, warm-up only": fishleg(0),
    "FishLeg, 100 steps": fishleg(100),
    "FishLeg, 100 steps, sum of single changes": fishleg(100, joint=False),
}


def measure(case: Case, name: str) -> dict[str, Any]:
    method, scope = METHODS[name], "layer" if name.endswith("layer") else "global"
    best: dict[str, Any] = {}
    held = tuple(t[-2000:] for t in case.train_set)
    for factor in (0.0,) if method in (magnitude, at_random) else FACTORS:
        scores, pruned = method(case, factor * case.mean)
        tuned = case.score(pruned(build_masks(scores, 0.9, scope)), *held)[0]
        if not best or tuned < best["tuned"]:
            best = {"factor": factor, "tuned": tuned, "found": (scores, pruned)}
    scores, pruned = best.pop("found")
    rates = {}
    for rate in RATES:
        keep = build_masks(scores, rate, scope)
        rates[str(rate)] = {
            "removed": case.score(case.plain(keep), *case.test_set),
            "compensated": case.score(pruned(keep), *case.test_set),
        }
    return {**best, "rates": rates}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| test loss / accuracy | {' | '.join(f'{rate:.0%}' for rate in RATES)} |",
        "|---" * (len(RATES) + 1) + "|",
    ]
    for name in METHODS:
        own = [row for row in rows if row["method"] == name]
        cells = []
        for rate in RATES:
            found = [row["rates"][str(rate)]["compensated"] for row in own]
            loss, accuracy = ([f[i] for f in found] for i in (0, 1))
            mean, half = mean_and_interval(accuracy) or (0.0, 0.0)
            cells.append(f"{statistics.mean(loss):.3f} / {mean:.4f} ± {half:.4f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", required=True, help="folder of MNIST in torchvision's layout")
    parser.add_argument("--seed", type=int, action="append", help="repeat for several; by default 0, 1 and 2")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file; a .md beside it has the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, test = images(arguments.mnist, True, TRAIN), images(arguments.mnist, False, TEST)
    rows, dense = [], []
    for seed in arguments.seed or (0, 1, 2):
        case = Case(seed, train, test)
        dense.append(case.score(case.parameters, *test))
        for name in METHODS:
            rows.append({"seed": seed, "method": name, **measure(case, name)})
            print(json.dumps(rows[-1]), flush=True)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    facts = {**machine, "dense": dense, "rows": rows}
    arguments.output.write_text(json.dumps(facts, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
