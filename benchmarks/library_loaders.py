"""The loader of worker processes beside PyTorch's DataLoader: its speed, and what follows where a worker dies.

`libraries.py loaders` runs it.
"""

from __future__ import annotations

import contextlib
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
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpc_supcon.data import LoaderOptions, TrainOrder, build_loader
from hpc_supcon.data.sources.folder import open_folder

ROUNDS, BATCH, WORKERS, TIMEOUT_S = 7, 64, 2, 10.0
ANSWER_S = 60.0
"""How long a program with a faulty worker may take, from its start, before "no answer" is noted with this time."""


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
