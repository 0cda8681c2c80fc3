"""Pruning: section `prune`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from .base import Count, NonNegative, Positive, Section
from .names import PruningMethodName, PruningScopeName


class PruneFinetuneConfig(Section):
    epochs: Annotated[int, Field(ge=0)] = Field(
        description="passes over the training split after pruning, by the run's own loss and optimizer, pruned "
        "weights kept at zero; 0: none",
        json_schema_extra={"unit": "epochs"},
    )
    iterations: Count | None = Field(
        description="optimizer steps; when set, replaces epochs", json_schema_extra={"unit": "steps"}
    )
    lr: Positive | None = Field(
        description="peak learning rate, used as written; null: a tenth of the pre-training's peak"
    )
    schedule: Literal["cosine", "constant"] = Field(description="cosine: learning rate falls to 0 at the last step")
    warmup_epochs: NonNegative = Field(description="linear warm-up", json_schema_extra={"unit": "epochs"})


class PruneConfig(Section):
    method: PruningMethodName = Field(description="l1: weights of the smallest absolute value go first")
    rate: float | tuple[float, ...] = Field(
        description="share of the encoder's convolution and linear weights to prune, 0 to below 1; or a list of "
        "shares, each pruned from the dense encoder"
    )
    scope: PruningScopeName = Field(
        description="global: `rate` is the share of all these weights together; layer: of the weights of each layer"
    )
    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = Field(
        description="added to the folder's name, RUN_DIR/pruned/METHOD-SCOPE-RATE-LABEL, to keep two prunings of one "
        "rate apart; null: nothing"
    )
    finetune: PruneFinetuneConfig

    @field_validator("rate")
    @classmethod
    def _is_a_share(cls, rate: float | tuple[float, ...]) -> float | tuple[float, ...]:
        rates = rate if isinstance(rate, tuple) else (rate,)
        if not rates:
            raise ValueError("prune.rate is an empty list: name one rate or more, such as [0.2, 0.5]")
        for one in rates:
            if not 0 <= one < 1:
                raise ValueError(f"prune.rate={one:g}: the share of weights to prune is 0 or more and below 1")
        return rate

    @property
    def rates(self) -> tuple[float, ...]:
        return self.rate if isinstance(self.rate, tuple) else (self.rate,)

    @property
    def finetunes(self) -> bool:
        return self.finetune.epochs > 0 or self.finetune.iterations is not None
