"""Whole runs of several ranks under the injector, forked from a server that has imported everything."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

from hpc_supcon import checkpoint
from hpc_supcon.distributed import watch_threads

from ..dist import ranks as _preloaded  # noqa: F401 (its fork server imports once for all)
from . import injector

SETTINGS = [
    "data.source=synthetic", "data.synthetic={images: 90, classes: 3, channels: 3, image_size: 16}",
    "data.batch_size=12", "model.encoder=conv", "model.projection_hidden=32", "model.projection_dim=16",
    "train.epochs=4", "checkpoint.every_epochs=null", "checkpoint.every_steps=7", "log.every_steps=1",
    "log.tensorboard=false", "log.progress=false", "deterministic=true", "runtime.threads=1",
]  # fmt: skip
STEPS_PER_EPOCH = 81 // 12
STEPS = 4 * STEPS_PER_EPOCH
GONE_S = 150
"""A run that has not ended by then never will."""


class Run:
    """Ranks of one run; `said` is what all of them wrote to stderr."""

    def __init__(self, ranks, folder, *more, fault="", stage="pretrain", main=None, environment=None):
        self.folder, self._said = folder, folder.with_suffix(".stderr")
        self._said.unlink(missing_ok=True)
        arguments = [stage, "default", *SETTINGS, f"run_dir={folder}", *more]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        self.ranks = []
        given = {"HPC_SUPCON_FAULT": fault, **(environment or {})}
        for rank in range(ranks):
            environment = given
            if ranks > 1:
                world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank}
                environment |= world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = context.Process(target=_run, args=(arguments, environment, str(self._said), main))
            process.start()
            self.ranks.append(process)

    def end(self, within_s=GONE_S):
        """Exit codes in rank order, of a run that must end by itself."""
        for process in self.ranks:
            process.join(within_s)
        left = [rank for rank, process in enumerate(self.ranks) if process.exitcode is None]
        for process in self.ranks:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        assert not left, f"ranks {left} are still there after {within_s} s\n{self.said}"
        return [process.exitcode for process in self.ranks]

    @property
    def said(self):
        return self._said.read_text()


def _run(arguments, environment, said, main):
    with Path(said).open("a") as file:
        os.dup2(file.fileno(), 2)
    os.environ |= {key: str(value) for key, value in environment.items()}
    sys.argv[1:] = arguments
    watch_threads.NOTES_S = 0.02  # steps are so short here that a run would end before it could leave
    (main or injector.main)()


def run(ranks, folder, *more, code=0, **settings):
    """A run whose ranks all end with `code`; returns what they said."""
    it = Run(ranks, folder, *more, **settings)
    assert it.end() == [code] * ranks, it.said
    return it.said


def hashes(folder, step=STEPS):
    path = folder / "checkpoints" / f"step-{step}"
    checkpoint.load_checkpoint(path)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.glob("*.safetensors")}


def newest(folder):
    return checkpoint.load_newest(folder / "checkpoints")[0].state["step"]


def events(folder, name):
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def steps(folder, name="train"):
    return [line["step"] for line in events(folder, name)]
