"""What `bench step` measures: a training run of one configuration, and the row with its result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from ..allocator import keep_freed_memory
from ..config import Config, load_config
from ..data import Batch
from ..distributed.launch import Launch, Runtime, set_numerics
from ..models import build_model
from ..phases import Clock, measured_by, phase
from ..training import build
from ..training.data import load_data
from ..training.profile import Breakdown, breakdown
from ..training.step import train_step

ROUNDS, WARM_UP = 3, 2
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class StepRow:
    """The measurement of one encoder, precision and batch size: the best of ROUNDS rounds of `steps` steps."""

    encoder: str
    precision: str
    compile: bool
    batch_size: int
    """In images."""
    status: str
    """"ok", OUT_OF_MEMORY, or empty before it is measured."""
    views_per_s: float = 0.0
    views_per_s_worst: float = 0.0
    """Of the worst round."""
    encoder_share: float = 0.0
    """Share of the encoder in the step's time, 0..1."""
    peak_bytes: int = 0
    """Including model, optimizer and batch."""
    steps: int = 0
    seconds: dict[str, float] | None = None
    """Of each phase per step."""

    @property
    def label(self) -> str:
        return f"{self.encoder} {self.precision}{' compiled' if self.compile else ''}"

    @property
    def fits(self) -> bool:
        return self.status != OUT_OF_MEMORY


def step_config(encoder: str, precision: str, compiled: bool, batch_size: int, overrides: Sequence[str]) -> Config:
    """The configuration of one row: the defaults, on synthetic images of 32 px. Raises ConfigError."""
    settings = [
        "data.source=synthetic",
        "data.validation_fraction=0",
        "data.loader=resident",
        f"data.synthetic.images={max(1024, batch_size)}",
        *overrides,
        f"model.encoder={encoder}",
        f"train.precision={precision}",
        f"data.batch_size={batch_size}",
    ]
    return load_config("default", [*settings, "train.compile=true"] if compiled else settings, stages=("pretrain",))


def check(config: Config, kind: str) -> None:
    """Raise ConfigError or DataError where no step can be taken; `kind`: of the device."""
    data = load_data(config, Runtime(Launch(), torch.device(kind)))
    build_model(build.describe_model(config, data.splits))


class StepSession:
    """A training run without a run folder, in one process: `run(n)` does n steps, as `hpc-supcon pretrain` would."""

    def __init__(self, config: Config, device: torch.device) -> None:
        runtime = Runtime(Launch(), device)
        set_numerics(config.deterministic)  # as `launch.start` does for a run
        if device.type == "cpu" and config.runtime.reuse_memory:
            keep_freed_memory()
        self.data = load_data(config, runtime)
        self.training = build.build_training(config, self.data, runtime)
        self.training.state.parallel.train()
        self._batches = self._endless()

    def _endless(self) -> Iterator[Batch]:
        for epoch in count():
            yield from self.training.loader.epoch(epoch)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            with phase("data"):
                batch = next(self._batches)
            train_step(self.training.state, batch, self.training.options)

    def measure(self, steps: int) -> Breakdown:
        """Run `steps` more steps, and measure them."""
        clock = Clock(self.training.state.device)
        with measured_by(clock, self.training.state.model):
            self.run(steps)
            return breakdown(clock, steps)

    def close(self) -> None:
        self.training.loader.close()
