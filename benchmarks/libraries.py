"""Parts of this package beside those of a library that could take their place: LARS and LAMB, workers, memory.

    python benchmarks/libraries.py [--json OUT.json] [optimizers] [loaders] [memory]

Times are taken in turns within one process; each figure is the best of the rounds. What happens to a loader whose
worker dies or stops is tried on real processes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from library_loaders import loaders
from timm.optim.lamb import Lamb as TimmLamb
from timm.optim.lars import Lars as TimmLars
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_supcon.bench.common import machine
from hpc_supcon.training.memory import _LiveBytes
from hpc_supcon.training.optim import build_optimizer

ROUNDS, STEPS = 7, 24


class CountOps(TorchDispatchMode):
    """Operators dispatched inside; multi-tensor ones whose lists have tensors of different shapes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.fallbacks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
        # PyTorch's CUDA kernels for binary operators take the fast way only for equal shapes, pair by pair
        if "_foreach_" in str(func) and "addcmul" not in str(func) and len(lists) > 1:
            self.fallbacks += sum(a.shape != b.shape for a, b in zip(*lists[:2], strict=True))
        return func(*args, **(kwargs or {}))


def optimizers() -> dict[str, Any]:
    """Milliseconds of a step on ResNet-50's parameters, operators, and the largest difference after STEPS steps."""

    def parameters() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        return list(timm.create_model("resnet50", num_classes=0).parameters())

    def groups(params: list[torch.nn.Parameter], decay: float) -> list[dict[str, Any]]:
        weights, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
        return [
            {"params": weights, "weight_decay": decay, "always_adapt": True},
            {"params": rest, "weight_decay": 0.0},
        ]

    makers: dict[str, dict[str, Callable[[Any], torch.optim.Optimizer]]] = {
        "lars": {
            "ours": lambda p: build_optimizer(p, name="lars", lr=0.1, weight_decay=1e-4),
            "timm": lambda p: TimmLars(groups(p, 1e-4), lr=0.1, momentum=0.9, eps=0.0, foreach=True),
        },
        "lamb": {
            "ours": lambda p: build_optimizer(p, name="lamb", lr=1e-3, weight_decay=1e-2),
            "timm": lambda p: TimmLamb(groups(p, 1e-2), lr=1e-3, max_grad_norm=None, foreach=True),
        },
    }
    found: dict[str, Any] = {}
    for name, contenders in makers.items():
        made = {who: (params := parameters(), make(params)) for who, make in contenders.items()}
        best, ops, fallbacks = dict.fromkeys(made, float("inf")), {}, {}
        for round_ in range(STEPS):
            torch.manual_seed(round_)
            grads = [torch.randn_like(p) for p in made["ours"][0]]
            for who, (params, optimizer) in list(made.items())[:: 1 if round_ % 2 else -1]:
                for p, g in zip(params, grads, strict=True):
                    p.grad = g.clone()
                start = time.perf_counter()
                optimizer.step()
                best[who] = min(best[who], time.perf_counter() - start)
        for who, (_, optimizer) in made.items():
            with CountOps() as count:
                optimizer.step()
            ops[who], fallbacks[who] = count.ops, count.fallbacks
        differences = [
            float((a - b).detach().abs().max()) for a, b in zip(made["ours"][0], made["timm"][0], strict=True)
        ]
        found[name] = {
            "ms": {who: round(1e3 * s, 2) for who, s in best.items()},
            "operators": ops,
            "launches_for_single_tensors_on_cuda": fallbacks,
            "largest_difference": max(differences),
        }
    return found


def memory() -> dict[str, Any]:
    """Peak bytes of a training pass on ResNet-18 by each tracker, and seconds that the pass takes under it."""
    model = timm.create_model("resnet18", num_classes=0)
    x = torch.randn(8, 3, 64, 64)

    def work() -> None:
        torch.autograd.grad(model(x).sum(), list(model.parameters()))

    found: dict[str, Any] = {"peak_mib": {}, "seconds": {"none": _best(work)}}

    def ours() -> None:
        with _LiveBytes() as live:
            work()
        found["peak_mib"]["ours"] = round(live.peak / 2**20, 1)

    def theirs() -> None:
        tracker = MemTracker()
        tracker.track_external(model, x)
        before = sum(p.numel() * 4 for p in model.parameters()) + sum(b.nbytes for b in model.buffers()) + x.nbytes
        with tracker:
            work()
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
        found["peak_mib"]["MemTracker, less what was there"] = round((peak - before) / 2**20, 1)

    found["seconds"] |= {"ours": _best(ours), "MemTracker": _best(theirs)}
    return found


def _best(work: Callable[[], None]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return round(min(times), 4)


def main() -> None:
    parts: dict[str, Callable[[], dict[str, Any]]] = {"optimizers": optimizers, "loaders": loaders, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*parts, []])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine("cpu") | {"timm": timm.__version__}}
    for name in chosen.parts or parts:
        found[name] = parts[name]()
        print(name, json.dumps(found[name], indent=1), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
