"""Pruning: section `prune`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Count, NonNegative, Positive, Section

Rate = Annotated[float, Field(ge=0, lt=1)]


class PruneFinetuneConfig(Section):
    epochs: Annotated[int, Field(ge=0)] = Field(
        description="passes over the training split after pruning, by the run's own loss and optimiser, pruned "
        "weights held at zero; 0: none",
        json_schema_extra={"unit": "epochs"},
    )
    iterations: Count | None = Field(
        description="optimiser steps; when set, replaces epochs", json_schema_extra={"unit": "steps"}
    )
    lr: Positive | None = Field(
        description="peak learning rate, used as written; null: a tenth of the pre-training's peak"
    )
    schedule: Literal["cosine", "constant"] = Field(description="cosine: learning rate falls to 0 at the last step")
    warmup_epochs: NonNegative = Field(description="linear warm-up", json_schema_extra={"unit": "epochs"})


class PruneConfig(Section):
    method: str = Field(description="l1: weights of the smallest absolute value go first")
    rate: Rate | Annotated[tuple[Rate, ...], Field(min_length=1)] = Field(
        description="share of the encoder's convolution and linear weights to prune, or a list of shares, each from "
        "the dense encoder"
    )
    scope: Literal["global", "layer"] = Field(
        description="global: the share of all these weights together; layer: of each layer's"
    )
    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = Field(
        description="added to the folder's name, RUN_DIR/pruned/METHOD-SCOPE-RATE-LABEL, to keep two prunings of one "
        "rate apart; null: nothing"
    )
    finetune: PruneFinetuneConfig

    @property
    def rates(self) -> tuple[float, ...]:
        return self.rate if isinstance(self.rate, tuple) else (self.rate,)

    @property
    def finetunes(self) -> bool:
        return self.finetune.epochs > 0 or self.finetune.iterations is not None
