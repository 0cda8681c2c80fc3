"""Whole runs of several ranks with injected faults."""

from __future__ import annotations

import hashlib
import json
from functools import partial

from hpc_supcon import checkpoint
from hpc_supcon.distributed import monitors

from ..processes import Ranks
from . import injector

SETTINGS = [
    "report.embeddings=false",
    "data.source=synthetic", "data.synthetic={images: 90, classes: 3, channels: 3, image_size: 16}",
    "data.batch_size=12", "model.encoder=conv", "model.projection_hidden=32", "model.projection_dim=16",
    "train.epochs=4", "checkpoint.every_epochs=null", "checkpoint.every_steps=7", "log.every_steps=1",
    "log.tensorboard=false", "log.progress=false", "deterministic=true", "runtime.threads=1",
    "runtime.device=cpu",  # also on a machine with fewer GPUs than ranks
]  # fmt: skip
STEPS_PER_EPOCH = 81 // 12
STEPS = 4 * STEPS_PER_EPOCH


class Run(Ranks):
    """The processes of one run with injected faults, one for each rank."""

    def __init__(
        self,
        ranks,
        folder,
        *more,
        fault="",
        stage="pretrain",
        main=None,
        environment=None,
        settings=SETTINGS,
        stderr=None,
    ):
        self.folder = folder
        super().__init__(
            [stage, "default", *settings, f"run_dir={folder}", *more],
            stderr or folder.with_suffix(".stderr"),
            ranks,
            environment={"HPC_SUPCON_FAULT": fault, **(environment or {})},
            main=partial(_main, main or injector.main),
        )


def _main(main):
    monitors.EXCHANGE_INTERVAL_S = 0.02  # with steps this short, a run would end before all ranks know of a signal
    main()


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
