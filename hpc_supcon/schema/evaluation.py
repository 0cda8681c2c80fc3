"""Evaluation: section `probe`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Count, NonNegative, Positive, Section


class ProbeConfig(Section):
    kind: Literal["linear"] = Field(description="classifier on the frozen features")
    epochs: Count = Field(description="passes over the cached features", json_schema_extra={"unit": "epochs"})
    batch_size: Count = Field(description="features per step", json_schema_extra={"unit": "images"})
    optimiser: Literal["adamw", "sgd"] = Field(description="optimiser of the head")
    lrs: tuple[Positive, ...] = Field(
        min_length=1, description="learning rates trained at once; validation accuracy chooses"
    )
    weight_decay: NonNegative = Field(description="weight decay of the head")
    standardise: bool = Field(description="give features zero mean and unit variance (over train) first")
