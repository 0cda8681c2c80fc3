"""What is drawn and written of a run at its end: section `report`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Count, Section
from .names import MapMethodName, SpaceName

Perplexity = Annotated[float, Field(ge=1)]


class ReportConfig(Section):
    embeddings: bool = Field(description="draw maps of the embeddings at the end of `run`")
    html: bool = Field(description="write the page report.html at the end of `run`")
    split: Literal["train", "validation", "test"] = Field(description="the images that maps and neighbors are of")
    points: Annotated[int, Field(ge=5)] = Field(
        description="points of a map: a sample of the split's images, of every class in proportion to its size; of "
        "more than points / 20 classes, that many classes",
        json_schema_extra={"unit": "images"},
    )
    spaces: tuple[SpaceName, ...] = Field(
        min_length=1,
        description="where the points are before they are mapped: pixels, the encoder's features, and the output of "
        "the projection head where the run has one",
    )
    methods: tuple[MapMethodName, ...] = Field(min_length=1, description="kinds of maps; umap needs the extra umap")
    perplexity: Perplexity | tuple[Perplexity, ...] = Field(
        description="effective number of neighbors of a point in t-SNE; a list: several scales at once"
    )
    checkpoints: Annotated[int, Field(ge=0)] = Field(
        description="checkpoints between the first step and the best one that are drawn too, evenly spaced among "
        "those that the run keeps",
        json_schema_extra={"unit": "checkpoints"},
    )
    queries: Annotated[int, Field(ge=0)] = Field(
        description="images whose nearest neighbors are shown, of as many classes as possible; 0: none",
        json_schema_extra={"unit": "images"},
    )
    neighbors: Count = Field(description="neighbors shown of each query", json_schema_extra={"unit": "images"})
