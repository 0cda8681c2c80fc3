"""Parts of this package beside those of a library that could take their place: LARS and LAMB, workers, memory.

    python benchmarks/libraries.py [--json OUT.json] [optimizers] [loaders] [memory]

Times are taken in turns within one process; each figure is the best of the rounds. What happens to a loader whose
worker dies or stops is tried on real processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.optim.lamb import Lamb as TimmLamb
from timm.optim.lars import Lars as TimmLars
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from hpc_supcon.bench.common import machine
from hpc_supcon.data import LoaderOptions, TrainOrder, build_loader
from hpc_supcon.data.sources.folder import open_folder
from hpc_supcon.training.memory import _LiveBytes
from hpc_supcon.training.optim import build_optimizer

ROUNDS, STEPS, BATCH, WORKERS, TIMEOUT_S = 7, 24, 64, 2, 10.0
ANSWER_S = 60.0
"""How long a program with a faulty worker may take, from its start, before "no answer" is noted with this time."""


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


class Images(Dataset[tuple[Tensor, int]]):
    """What a user of DataLoader writes for a folder of images."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.source.read(i), int(self.source.labels[i])


def make_folder(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, n in (("train", 256), ("test", 4)):
        for c in range(4):
            folder = root / split / f"class-{c}"
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")


class OurEpochs:
    def __init__(self, source: Any) -> None:
        options = LoaderOptions(WORKERS, TIMEOUT_S)
        order = TrainOrder(len(source), BATCH)
        self.loader = build_loader(
            "torch", source, order, seed=0, rank=0, world_size=1, device="cpu", options=options
        )

    def epoch(self, epoch: int) -> Iterator[Any]:
        return self.loader.epoch(epoch)

    def close(self) -> None:
        self.loader.close()


class TorchEpochs:
    """DataLoader as recommended: fork server, workers that live on."""

    def __init__(self, source: Any) -> None:
        self.loader = DataLoader(
            Images(source), BATCH, shuffle=True, drop_last=True, num_workers=WORKERS, timeout=TIMEOUT_S,
            persistent_workers=True, multiprocessing_context="forkserver",
        )  # fmt: skip

    def epoch(self, epoch: int) -> Iterator[Any]:
        return iter(self.loader)

    def close(self) -> None:
        pass


KINDS: dict[str, Callable[[Any], Any]] = {"ours": OurEpochs, "DataLoader": TorchEpochs}


def throughput(source: Any) -> dict[str, Any]:
    """Images/s over an epoch, in turns, and seconds from nothing to the first batch."""
    first, best, made = {}, dict.fromkeys(KINDS, 0.0), {}
    for who, make in KINDS.items():
        start = time.perf_counter()
        made[who] = make(source)
        next(iter(made[who].epoch(0)))
        first[who] = round(time.perf_counter() - start, 2)
    for epoch in range(1, ROUNDS + 1):
        for who, loader in made.items():
            start, n = time.perf_counter(), 0
            for _ in loader.epoch(epoch):
                n += BATCH
            best[who] = max(best[who], n / (time.perf_counter() - start))
    for loader in made.values():
        loader.close()
    return {"images_per_s": {who: round(n) for who, n in best.items()}, "first_batch_s": first}


def _victim(pipe: Connection, who: str, folder: str, what: str, seed: int) -> None:
    """Serves epochs while one of its workers is killed or stopped; sends the error and how long it took."""
    os.setpgrp()
    # a signal to the whole group is this program's to survive, as a run's is; the question is its workers
    signal.signal(signal.SIGUSR2, lambda *_: None)
    source = open_folder(Path(folder), image_size=96, channels=3)[0]
    loader = KINDS[who](source)
    chance = random.Random(seed)
    began = None
    try:
        for epoch in range(40):
            for step, _ in enumerate(loader.epoch(epoch)):
                if began is None and epoch == 1 and step == 3:
                    time.sleep(chance.random() * 0.02)
                    children = [c.pid for c in multiprocessing.active_children() if c.pid]
                    began = time.perf_counter()
                    if what == "group":
                        os.killpg(0, signal.SIGUSR2)
                    else:
                        os.kill(chance.choice(children), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
                if began is not None and what == "group" and epoch == 4:
                    pipe.send(("survives", 0.0))
                    return
        pipe.send(("no error", 0.0))
    except BaseException as error:
        pipe.send((type(error).__name__, round(time.perf_counter() - (began or 0), 2)))
    finally:
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(0)


def faults(folder: Path, times: int) -> dict[str, Any]:
    """What the training program meets when a worker is killed, is stopped, or its process group gets a signal."""
    found: dict[str, Any] = {}
    for what, n in (("kill", times), ("stop", 2), ("group", 3)):
        for who in KINDS:
            outcomes: dict[str, list[float]] = {}
            for seed in range(n):
                ours, theirs = multiprocessing.get_context("spawn").Pipe()
                process = multiprocessing.get_context("spawn").Process(
                    target=_victim, args=(theirs, who, str(folder), what, seed)
                )
                process.start()
                theirs.close()
                outcome, seconds = "no answer", ANSWER_S
                if ours.poll(ANSWER_S):
                    with contextlib.suppress(EOFError):
                        outcome, seconds = ours.recv()
                outcomes.setdefault(outcome, []).append(seconds)
                with contextlib.suppress(ProcessLookupError, TypeError):
                    os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
                process.join()
            found.setdefault(what, {})[who] = {k: {"n": len(v), "longest_s": max(v)} for k, v in outcomes.items()}
            print(what, who, found[what][who], flush=True)
    return found


def loaders() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name))
        source = open_folder(Path(name), image_size=96, channels=3)[0]
        return {**throughput(source), "faults": faults(Path(name), 12)}


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
