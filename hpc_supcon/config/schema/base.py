"""What every section of the configuration shares: strictness, and the ranges of numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Options = dict[str, Any] | None
"""The arguments of a part of a user's own, as its signature has them (see parts.py)."""
Decay = Annotated[
    Literal["weights", "all"],
    Field(
        description="what weight decay is for; weights: not for norms, biases and a learned temperature; all: every "
        "parameter, as torch.optim.SGD(model.parameters()) has it"
    ),
]


class Section(BaseModel):
    # strict: "5" is no number and 1 is no boolean; validated from JSON, where a list may be a tuple
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(`section.key`, its field) of every setting of a section and of the sections in it, in order."""
    for name, info in model.model_fields.items():
        section = info.annotation
        # in Python 3.10, list[str] is an instance of type, too
        if isinstance(section, type) and get_origin(section) is None and issubclass(section, BaseModel):
            yield from settings_of(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


class StoppingConfig(Section):
    """Early stopping by what is measured on the validation split."""

    monitor: Literal["loss", "accuracy"] = Field(description="the quantity, measured on the validation split")
    patience: Annotated[int, Field(ge=0)] | None = Field(
        description="stop after this many evaluations in a row, or iterations from the best evaluation on, without "
        "an improvement; 0: at the first evaluation without one; null: never",
        json_schema_extra={"unit": "patience_unit"},
    )
    patience_unit: Literal["evaluations", "iterations"] = Field(description="what patience counts")
    min_change: NonNegative = Field(description="an improvement is a change for the better by more than this")
    target: float | None = Field(description="stop as soon as this value is reached; null: no target")

    @property
    def enabled(self) -> bool:
        return self.patience is not None or self.target is not None
