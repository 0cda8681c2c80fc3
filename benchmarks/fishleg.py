"""The learned inverse Fisher matrix against the exact one, in float64, on problems small enough to form it.

    python benchmarks/fishleg.py -o results.json

Of each problem: the error of Q's diagonal relative to that of (F + damping I)^-1; the share of weights for which
pruning by Q decides as the exact surgeon does, at 30, 50 and 80 %; and at how many of nine rates (10 to 90 %) the
compensated weights have a lower loss than plain removal by the same masks. "layers" is the exact inverse of each
layer's own block: what a matrix without entries between layers can reach. The loss is the divergence from the outputs
before pruning. "Across layers" is after 30 iterations of `improve_compensation`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from hpc_supcon.pruning import (
    Categorical,
    Gaussian,
    InverseFisher,
    ModelFisher,
    build_masks,
    improve_compensation,
    removal_scores,
)

SEEDS, STEPS, SAMPLES = (0, 1, 2), 400, 200
RATES = (0.3, 0.5, 0.8)
VARIANTS: dict[str, dict[str, Any]] = {
    "random directions": {"directions": "random"},
    "Fisher directions": {"directions": "fisher"},
    "random, steps not preconditioned": {"directions": "random", "preconditioned": False},
    "random, no warm-up": {"directions": "random", "warmup": 0},
    "warm-up only": {"steps": 0},
}
Tensors = dict[str, Tensor]


class Problem:
    """A model, its data, and its exact Fisher matrix."""

    def __init__(self, kind: str, damping: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.damping, self.is_linear = damping, kind == "regression"
        self.x = torch.randn(SAMPLES, 10).double() @ (torch.randn(10, 10).double() / 10**0.5)
        self.model: nn.Module = nn.Linear(10, 4).double()
        if not self.is_linear:
            self.model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 4)).double()
            self._train()
        self.likelihood = Gaussian() if self.is_linear else Categorical()
        self.p = {name: t.detach() for name, t in self.model.named_parameters()}
        self.z = self.outputs(self.p, self.x)
        exact = self._fisher() + damping * torch.eye(sum(t.numel() for t in self.p.values())).double()
        self.exact = self.like(torch.linalg.inv(exact).diagonal())
        self.diagonal = self.like(1 / exact.diagonal())
        layer = [name.rpartition(".")[0] for name, t in self.p.items() for _ in range(t.numel())]
        same = torch.tensor([[a == b for b in layer] for a in layer])
        self.layers = self.like(torch.linalg.inv(exact * same).diagonal())

    def _train(self) -> None:
        y = (self.x @ torch.randn(10, 4).double()).argmax(1)
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-2)
        for _ in range(200):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x), y).backward()
            optimizer.step()

    def outputs(self, parameters: Any, x: Tensor) -> Tensor:
        return functional_call(self.model, parameters, (x,))

    def _fisher(self) -> Tensor:
        found = jacrev(lambda p: self.outputs(p, self.x))(self.p)
        j = torch.cat([t.reshape(*self.z.shape, -1) for t in found.values()], dim=2)
        m = torch.eye(4).double().expand(SAMPLES, 4, 4)
        if not self.is_linear:
            p = self.z.softmax(1)
            m = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("nka,nkl,nlb->ab", j, m, j) / SAMPLES

    def like(self, vector: Tensor) -> Tensors:
        parts = vector.split([t.numel() for t in self.p.values()])
        return {name: part.view(t.shape) for (name, t), part in zip(self.p.items(), parts, strict=True)}

    def masks(self, diagonal: Tensors, rate: float) -> Tensors:
        scores = removal_scores({name: t for name, t in self.p.items() if t.ndim > 1}, diagonal)
        return build_masks(scores, rate, "global")

    def loss(self, weights: Tensors) -> float:
        z = self.outputs(weights, self.x)
        if self.is_linear:
            return float((z - self.z).square().mean())
        return float(nn.functional.kl_div(z.log_softmax(1), self.z.softmax(1), reduction="batchmean"))

    def compare(self, diagonal: Tensors) -> dict[str, Any]:
        error = torch.cat([(diagonal[name] / t - 1).abs().flatten() for name, t in self.exact.items()])
        same = []
        for rate in RATES:
            own, exact = self.masks(diagonal, rate), self.masks(self.exact, rate)
            equal = torch.cat([(own[name] == exact[name]).flatten() for name in own])
            same.append(float(equal.double().mean()))
        return {"mean error": float(error.mean()), "largest error": float(error.max()), "same decisions": same}

    def lowered(self, inverse: InverseFisher, fisher: ModelFisher) -> dict[str, list[bool]]:
        """Whether compensation by Q, and then across layers, lowers the loss, for each rate."""
        found: dict[str, list[bool]] = {"lowered": [], "lowered across layers": []}
        for rate in range(10, 100, 10):
            keep = self.masks(inverse.diagonal(), rate / 100)
            plain = {name: torch.where(keep[name], t, 0) if name in keep else t for name, t in self.p.items()}
            own = inverse.compensate(self.p, keep)
            across = improve_compensation(
                self.p, own, keep, lambda u: fisher.product((self.x, None), u, torch.Generator()), inverse.diagonal(),
                damping=self.damping, iterations=30,
            )  # fmt: skip
            for name, weights in (("lowered", own), ("lowered across layers", across)):
                found[name].append(self.loss(weights) < self.loss(plain))
        return found


def measure(problem: Problem, options: dict[str, Any]) -> dict[str, Any]:
    inverse = InverseFisher(problem.model, damping=problem.damping)
    fisher = ModelFisher(problem.p, problem.outputs, problem.likelihood)
    began = time.perf_counter()
    inverse.fit(fisher, lambda i: (problem.x, None), options.get("steps", STEPS), seed=0, lr=0.05,
                **{name: value for name, value in options.items() if name != "steps"})  # fmt: skip
    seconds = time.perf_counter() - began
    found = problem.compare(inverse.diagonal())
    return {**found, **problem.lowered(inverse, fisher), "seconds": seconds, "bytes": inverse.memory()}


def line(name: str, rows: list[dict[str, Any]]) -> str:
    mean = statistics.mean(row["mean error"] for row in rows)
    largest = max(row["largest error"] for row in rows)
    same = " / ".join(f"{min(row['same decisions'][i] for row in rows):.3f}" for i in range(len(RATES)))
    counts = []
    for key in ("lowered", "lowered across layers"):
        lowered = [done for row in rows for done in row.get(key, [])]
        counts.append(f"{sum(lowered)} of {len(lowered)}" if lowered else "")
    return f"| {name} | {mean:.3f} | {largest:.3f} | {same} | {' | '.join(counts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file; a .md beside it has the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results, text = [], []
    for kind, damping in (("regression", 0.02), ("network", 0.1), ("network", 0.02)):
        problems = [Problem(kind, damping, seed) for seed in SEEDS]
        text += [
            f"\n{kind}, damping {damping:g}, {len(SEEDS)} seeds\n",
            "| | mean error of the diagonal | largest | same decisions, worst seed, 30 / 50 / 80 % "
            "| loss lowered | and across layers |",
            "|---|---|---|---|---|---|",
        ]
        rows = {"diagonal of F": [p.compare(p.diagonal) for p in problems]}
        rows["layers, exact"] = [p.compare(p.layers) for p in problems]
        rows |= {name: [measure(p, options) for p in problems] for name, options in VARIANTS.items()}
        text += [line(name, own) for name, own in rows.items()]
        results.append({"problem": kind, "damping": damping, "rows": rows})
        print("\n".join(text), flush=True)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    facts = {**machine, "seeds": SEEDS, "steps": STEPS, "samples": SAMPLES, "results": results}
    arguments.output.write_text(json.dumps(facts, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text("\n".join(text).strip() + "\n")


if __name__ == "__main__":
    main()
