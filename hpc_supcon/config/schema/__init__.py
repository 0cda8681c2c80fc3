"""The configuration schema: every setting, its type, range, unit and meaning.

Values carry no defaults here: recipes/default.yaml is the one place that has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from .base import Count, Positive, Section
from .data import AugmentConfig, DataConfig
from .evaluation import ProbeConfig
from .model import ModelConfig
from .pruning import PruneConfig
from .report import ReportConfig
from .saving import CheckpointConfig, LogConfig
from .training import LossConfig, OptimConfig, TrainConfig, ValidationConfig


class RuntimeConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = Field(description="auto: CUDA where there is one")
    threads: Count | None = Field(description="CPU threads per rank; null: its share of the cores")
    reuse_memory: bool = Field(
        description="on a CPU, keep freed memory for the next step: 10 to 30 % faster for up to 1.7 times the memory"
    )
    timeout_s: Positive = Field(
        description="longest time for one training step, and without a sign of life of a rank; then all ranks end",
        json_schema_extra={"unit": "s"},
    )
    first_step_timeout_s: Positive = Field(
        description="the same for the first step of a process (compilation), and the longest wait for another rank "
        "in evaluation and saving",
        json_schema_extra={"unit": "s"},
    )
    start_timeout_s: Positive = Field(
        description="longest time for which the processes of a run wait for each other to start",
        json_schema_extra={"unit": "s"},
    )


class Config(Section):
    """A whole run. Field meanings: `hpc-supcon config --schema`."""

    name: str = Field(min_length=1, description="name of the run; also its folder when run_dir is null")
    run_dir: str | None = Field(description="run folder; null is runs/NAME")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(description="every random choice follows from it")
    deterministic: bool = Field(description="only deterministic algorithms: bit-identical repeats, slower on CUDA")
    data: DataConfig
    augment: AugmentConfig
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    train: TrainConfig
    validation: ValidationConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    probe: ProbeConfig
    prune: PruneConfig
    report: ReportConfig
    runtime: RuntimeConfig

    @property
    def folder(self) -> Path:
        return Path(self.run_dir) if self.run_dir is not None else Path("runs") / self.name
