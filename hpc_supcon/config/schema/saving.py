"""What training leaves behind: sections `checkpoint` and `log`."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field, model_validator

from .base import Count, Section
from .names import ArtifactName, LoggerName, OwnLogger, TrackerName


class CheckpointConfig(Section):
    every_epochs: Count | None = Field(
        description="save after every n-th epoch", json_schema_extra={"unit": "epochs"}
    )
    every_steps: Count | None = Field(description="save after every n-th step", json_schema_extra={"unit": "steps"})
    keep: Annotated[int, Field(ge=2)] = Field(
        description="number of newest checkpoints kept; damaged ones do not count"
    )
    keep_every_steps: Count | None = Field(
        description="keep the checkpoints of every n-th step for good; null: only the newest ones",
        json_schema_extra={"unit": "steps"},
    )
    asynchronous: bool = Field(
        description="write while training continues; needs host memory for one more copy of model and optimizer"
    )
    max_failed_saves: Annotated[int, Field(ge=0)] = Field(
        description="saves in a row that may fail (a full disk) before training stops; the last of a run may not",
        json_schema_extra={"unit": "saves"},
    )


class LogConfig(Section):
    every_steps: Count = Field(
        description="steps between two lines of metrics.jsonl", json_schema_extra={"unit": "steps"}
    )
    gradient_response: bool = Field(
        description="log how strongly positives attract and negatives repel (supcon_out, tcl), in the batch, "
        "without a queue; costs two more passes over the similarities"
    )
    to: LoggerName | OwnLogger | tuple[LoggerName | OwnLogger, ...] = Field(
        description="where numbers go besides metrics.jsonl: one, or a list; csv: RUN_DIR/metrics-KIND.csv; wandb, "
        "mlflow: extras of these names"
    )
    artifacts: tuple[ArtifactName, ...] = Field(
        description="files of a finished run that wandb and mlflow get besides numbers"
    )
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        description="serve the newest numbers to Prometheus at http://127.0.0.1:PORT/metrics (rank 0); null: no"
    )
    tensorboard: bool = Field(description="false: not to TensorBoard, though log.to names it")
    progress: bool = Field(description="show a progress bar (rank 0, on a terminal)")

    @model_validator(mode="after")
    def _each_once(self) -> LogConfig:
        for name, values in (("to", self.loggers), ("artifacts", self.artifacts)):
            if len(set(values)) < len(values):
                raise ValueError(f"log.{name} names one twice: {', '.join(values)}")
        return self

    @property
    def loggers(self) -> tuple[str, ...]:
        names: tuple[str, ...] = (self.to,) if isinstance(self.to, str) else self.to
        return tuple(name for name in names if name != "tensorboard" or self.tensorboard)

    @property
    def trackers(self) -> tuple[str, ...]:
        return tuple(name for name in self.loggers if name in get_args(TrackerName))
