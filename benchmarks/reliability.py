"""What a run survives, and what that costs: writes benchmarks/results/reliability.md.

    python benchmarks/reliability.py            # about ten minutes on two cores
    python benchmarks/reliability.py --quick    # two minutes: fewer kills, for a look

The faults are those of tests/fault, which has a small version of each part.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from hpc_supcon import checkpoint  # noqa: E402
from hpc_supcon.bench.common import machine  # noqa: E402
from hpc_supcon.checkpoint.load import problem_of  # noqa: E402
from hpc_supcon.checkpoint.writer import CheckpointWriter  # noqa: E402
from hpc_supcon.distributed.watchdog import Watchdog  # noqa: E402
from hpc_supcon.training import step as step_module  # noqa: E402
from hpc_supcon.training.state import FiniteCheck  # noqa: E402
from hpc_supcon.training.step import train_step  # noqa: E402
from tests.dist.ranks import run_ranks  # noqa: E402
from tests.dist.test_step import build  # noqa: E402
from tests.fault import random_kills, runs  # noqa: E402
from tests.unit.checkpoint.test_damage import DAMAGE, FILES  # noqa: E402


def kills(root: Path, number: int) -> list[str]:
    """Random SIGKILLs against an uninterrupted run, on 1, 2 and 4 ranks."""
    lines = ["| ranks | SIGKILLs | of these inside a save | steps | final sha256 equal |", "|---|---|---|---|---|"]
    epochs = max(4, number * 6 // runs.STEPS_PER_EPOCH)
    last = epochs * runs.STEPS_PER_EPOCH
    for ranks in (1, 2, 4):
        whole, killed = root / f"whole-{ranks}", root / f"killed-{ranks}"
        runs.run(ranks, whole, *random_kills.settings(epochs))
        faults = random_kills.random_kills(killed, ranks, number, epochs=epochs, seed=ranks)
        equal = runs.hashes(killed, last) == runs.hashes(whole, last)
        inside = sum("phase=save" in fault for fault in faults)
        files = ", ".join(sorted(runs.hashes(whole, last)))
        lines.append(f"| {ranks} | {number} | {inside} | {last} | {'yes' if equal else 'NO'} ({files}) |")
        print(lines[-1], flush=True)
    return lines


def soak(root: Path, number: int) -> list[str]:
    """A run of 300 steps, two worker processes of the loader in it, killed and started again."""
    samples = random_kills.soak(root / "soak", 2, number, epochs=300 // runs.STEPS_PER_EPOCH)
    processes = list(dict.fromkeys(s["process"] for s in samples))
    names = ("memory_kib", "descriptors", "threads", "shm")
    lines = ["| process | steps | memory, MiB | file descriptors | threads | /dev/shm |", "|---|---|---|---|---|---|"]
    for process in (processes[0], processes[-1]):
        own = [s for s in samples if s["process"] == process]
        ranges = [f"{own[0][n]} to {own[-1][n]}" for n in names[1:]]
        memory = f"{own[0]['memory_kib'] / 1024:.1f} to {own[-1]['memory_kib'] / 1024:.1f}"
        which = "first" if process == processes[0] else "last"
        print(own[0], own[-1], flush=True)
        lines.append(f"| {which} | {own[0]['step']} to {own[-1]['step']} | {memory} | {' | '.join(ranges)} |")
    return [f"{number} kills, {len(processes)} processes of rank 0 (of 2 ranks) took a sample.", "", *lines]


def _costs(rank: int, world: int, steps: int) -> dict[str, Any]:
    """Seconds: steps of ResNet-18 (24 images of 8 px, two views) with and without watchdog and finite check in turn,
    and the calls by themselves. A larger step makes the share smaller."""
    torch.manual_seed(0)
    state, options, batches = build(rank, world, ["model.encoder=resnet18"])
    watchdog = Watchdog(step_timeout_s=600.0, first_step_timeout_s=600.0)
    taken: dict[bool, list[float]] = {True: [], False: []}
    with watchdog.training():
        for i in range(2 * steps):
            on = i % 2 == 0
            step_module.FiniteCheck = FiniteCheck if on else _NoCheck  # type: ignore[assignment, misc]
            began = time.perf_counter()
            result = train_step(state, batches[i % len(batches)], options)
            if on:
                watchdog.completed(state.step)
            taken[on].append(time.perf_counter() - began)

        def both() -> None:
            FiniteCheck(1, result.loss, result.gradient_norm, result.outputs).confirm()
            watchdog.completed(1)

        alone = _median(both, 2000)
    return {"with": taken[True][5:], "without": taken[False][5:], "alone": alone}


class _NoCheck:
    def __init__(self, *args: object) -> None: ...
    def confirm(self) -> None: ...


def _median(call: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def costs(steps: int) -> list[str]:
    lines = [
        "| ranks | step without, ms | step with, ms | both calls alone, µs | share of a step |",
        "|---|---|---|---|---|",
    ]
    for ranks in (1, 2):
        found = run_ranks(_costs, ranks, steps)[0]
        without, alone = statistics.median(found["without"]), found["alone"]
        spread = [f"{statistics.median(found[k]) * 1e3:.2f} ({_quartiles(found[k])})" for k in ("without", "with")]
        share = f"{alone / without:.3%}"
        lines.append(f"| {ranks} | {' | '.join(spread)} | {alone * 1e6:.1f} | {share} |")
        print(lines[-1], flush=True)
    return lines


def _quartiles(seconds: list[float]) -> str:
    low, _, high = statistics.quantiles(seconds, n=4)
    return f"{low * 1e3:.2f} to {high * 1e3:.2f}"


def stall(root: Path) -> list[str]:
    """What the main thread waits for a save of ResNet-18 with momentum, written beside training, and not."""
    weights = {f"w{i}": torch.randn(512, 512, 3, 3) for i in range(5)}  # 45 MiB
    tensors = {"model": weights, "optimizer": {f"{k}/momentum_buffer": t for k, t in weights.items()}}
    interval = 10 * 97  # steps between two saves at the default of ten epochs: CIFAR-10 in batches of 512
    lines = [
        f"| written | the step that saves waits, ms (median of 7) | µs a step over {interval} | 1 % of steps of |",
        "|---|---|---|---|",
    ]
    for asynchronous in (True, False):
        taken = []
        for i in range(7):
            folder = root / f"stall-{asynchronous}"

            def save(step: int, tensors: Any, state: Any, *, protect: Any = (), folder: Path = folder) -> object:
                return checkpoint.save_checkpoint(folder, step, tensors, state, world_size=1, config_digest="d")

            with CheckpointWriter(save, asynchronous=asynchronous) as writer:
                began = time.perf_counter()
                writer.save(i, tensors, {})
                taken.append(time.perf_counter() - began)
        name = "beside training (default)" if asynchronous else "in training's place"
        waits = statistics.median(taken)
        each = waits / interval
        lines.append(f"| {name} | {waits * 1e3:.1f} | {each * 1e6:.0f} | {each * 1e5:.2f} ms |")
        print(lines[-1], flush=True)
    return lines


def detection(root: Path, flips: int) -> list[str]:
    folder, chance = root / "damaged", random.Random(0)
    for step in (1, 2):
        tensors = {
            "model": {"a": torch.arange(600.0) + step, "b": torch.full((3, 4), 2.0)},
            "optimizer": {"a/momentum": torch.arange(600.0) * step},
            "rng": {"rank0.torch": torch.arange(200, dtype=torch.uint8) + step},
        }
        checkpoint.save_checkpoint(folder, step, tensors, {}, world_size=1, config_digest="d")
    path, seen = folder / "step-2", 0
    good = {name: (path / name).read_bytes() for name in FILES}
    for _ in range(flips):
        name = chance.choice(FILES)
        bad = bytearray(good[name])
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        (path / name).write_bytes(bad)
        seen += problem_of(path) is not None and checkpoint.load_newest(folder)[0].state["step"] == 1  # type: ignore[union-attr]
        (path / name).write_bytes(good[name])
    others = 0
    for name in FILES:
        for how in DAMAGE.values():
            how(path / name)
            others += problem_of(path) is not None
            if (path / name).is_dir():
                (path / name).rmdir()
            (path / name).unlink(missing_ok=True)
            (path / name).write_bytes(good[name])
    kinds = len(DAMAGE) * len(FILES)
    return [
        "| damage | times | detected, and the older checkpoint loaded |",
        "|---|---|---|",
        f"| one bit flipped | {flips} | {seen} |",
        f"| cut, zeroed, extended, deleted ... ({len(DAMAGE)} ways, {len(FILES)} files) | {kinds} | {others} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer kills")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "reliability.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    about = machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        parts = {
            "Random kills": kills(root, 3 if given.quick else 20),
            "Soak": soak(root, 2 if given.quick else 10),
            "Agreement and finite check": costs(20 if given.quick else 60),
            "Save": stall(root),
            "Damage": detection(root, 100 if given.quick else 1000),
        }
    command = "python benchmarks/reliability.py" + (" --quick" if given.quick else "")
    head = [
        "# Reliability", "",
        f"{date.today().isoformat()}, {about['device']}, {torch.get_num_threads()} thread for each rank, PyTorch "
        f"{about['torch']}, Python {about['python']}. Made by `{command}`.", "",
    ]  # fmt: skip
    text = "\n".join(head + [line for name, lines in parts.items() for line in (f"## {name}", "", *lines, "")])
    given.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
