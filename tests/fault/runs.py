"""Whole runs of several ranks with injected faults. The ranks are forked from a server that has imported torch."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

from hpc_supcon import checkpoint
from hpc_supcon.distributed import monitors

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
RUN_TIMEOUT_S = 600
"""A run takes seconds; one that takes this long hangs, however busy the machine is."""


class Run:
    """The processes of one run, one for each rank. They write to one file, `stderr`."""

    def __init__(self, ranks, folder, *more, fault="", stage="pretrain", main=None, environment=None):
        self.folder, self._stderr = folder, folder.with_suffix(".stderr")
        self._stderr.unlink(missing_ok=True)
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
            process = context.Process(target=_run, args=(arguments, environment, str(self._stderr), main))
            process.start()
            self.ranks.append(process)

    def end(self):
        """Wait until all ranks have ended by themselves; returns their exit codes, in rank order."""
        deadline = time.monotonic() + RUN_TIMEOUT_S
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        left = [rank for rank, process in enumerate(self.ranks) if process.exitcode is None]
        for process in self.ranks:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        assert not left, f"ranks {left} have not ended after {RUN_TIMEOUT_S} s\n{self.stderr}"
        return [process.exitcode for process in self.ranks]

    @property
    def stderr(self):
        return self._stderr.read_text()


def _run(arguments, environment, stderr, main):
    with Path(stderr).open("a") as file:
        os.dup2(file.fileno(), 2)
    os.environ |= {key: str(value) for key, value in environment.items()}
    sys.argv[1:] = arguments
    monitors.EXCHANGE_INTERVAL_S = 0.02  # with steps this short, a run would end before all ranks know of a signal
    (main or injector.main)()


def run(ranks, folder, *more, code=0, **settings):
    """A run whose ranks all end with `code`; returns their stderr."""
    it = Run(ranks, folder, *more, **settings)
    assert it.end() == [code] * ranks, it.stderr
    return it.stderr


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
