"""Section `model.lora`: low-rank adapters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .base import Count, Positive, Section


class LoraConfig(Section):
    """Low-rank adapters beside frozen weights of the encoder (Hu et al. 2021, arXiv 2106.09685)."""

    rank: Count | None = Field(
        description="train low-rank adapters of this rank, and the heads; the encoder's own weights and BatchNorm "
        "statistics stay as they are. Needs hpc-supcon[lora]; null: no adapters"
    )
    alpha: Positive = Field(description="what an adapter adds is multiplied by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(description="dropout of an adapter's input")
    targets: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        min_length=1,
        description="layers that get an adapter, linear or convolutional, by name or the end of it, such as "
        "[qkv, mlp.fc1]; null: all linear layers of the encoder",
    )
