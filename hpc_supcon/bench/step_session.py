"""A training run of the benchmark: its configuration, its steps, and the row that they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from ..allocator import keep_freed_memory
from ..config import Config, load_config
from ..data import Batch, Loader, build_loader
from ..distributed.launch import Launch, Runtime, seed_everything
from ..models import build_model
from ..phases import Clock, measured_by, phase
from ..training import assemble
from ..training.profile import Breakdown, breakdown
from ..training.state import TrainState
from ..training.step import train_step

ROUNDS, WARM_UP = 3, 2
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Result:
    """One row. `batch_size` in images, of `views` views each; the best of ROUNDS rounds of `steps` steps.

    `seconds` of each phase per step, of the best round; `peak_bytes`: model, optimizer and batch included.
    """

    encoder: str
    precision: str
    compile: bool
    batch_size: int
    status: str
    views_per_s: float = 0.0
    views_per_s_worst: float = 0.0
    encoder_share: float = 0.0
    peak_bytes: int = 0
    steps: int = 0
    seconds: dict[str, float] | None = None

    @property
    def label(self) -> str:
        return f"{self.encoder} {self.precision}{' compiled' if self.compile else ''}"

    @property
    def fits(self) -> bool:
        return self.status != OUT_OF_MEMORY


def settings(encoder: str, precision: str, compiled: bool, batch_size: int, overrides: Sequence[str]) -> Config:
    """The configuration of one row: the defaults, on synthetic images of 32 px. Raises ConfigError."""
    rows = [
        "data.source=synthetic",
        "data.validation_fraction=0",
        "data.loader=resident",
        f"data.synthetic.images={max(1024, batch_size)}",
        *overrides,
        f"model.encoder={encoder}",
        f"train.precision={precision}",
        f"data.batch_size={batch_size}",
    ]
    return load_config("default", [*rows, "train.compile=true"] if compiled else rows, stages=("pretrain",))


def check(config: Config, kind: str) -> None:
    """Raise ConfigError or DataError where no step could be taken."""
    data = assemble.load_data(config, Runtime(Launch(), torch.device(kind)))
    build_model(assemble.describe_model(config, data.splits))


class Session:
    """A training run without a run folder: `run(n)` does n steps, as `hpc-supcon pretrain` would."""

    def __init__(self, config: Config, device: torch.device) -> None:
        runtime = Runtime(Launch(), device)
        if device.type == "cpu" and config.runtime.reuse_memory:
            keep_freed_memory()
        self.data = assemble.load_data(config, runtime)
        splits = self.data.splits
        order = assemble.build_training_order(config, splits)
        self.loader: Loader = build_loader(
            self.data.loader, splits.train, order, seed=config.seed, rank=0, world_size=1, device=device,
            options=self.data.training,
        )  # fmt: skip
        self.description = assemble.describe_model(config, splits)
        assemble.seed_models(config)
        model, views = build_model(self.description), assemble.build_views(config, self.description, runtime)
        seed_everything(config.seed, 0)
        self.state: TrainState = assemble.build_state(
            config, model, assemble.build_objective(config, views), views, runtime
        )
        self.state.parallel.train()
        self._batches = self._endless()

    def _endless(self) -> Iterator[Batch]:
        for epoch in count():
            yield from self.loader.epoch(epoch)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            with phase("data"):
                batch = next(self._batches)
            train_step(self.state, batch)

    def measure(self, steps: int) -> Breakdown:
        """Of `steps` more steps."""
        clock = Clock(self.state.device)
        with measured_by(clock, self.state.model):
            self.run(steps)
            return breakdown(clock, steps)

    def close(self) -> None:
        self.loader.close()
