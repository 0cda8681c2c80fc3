"""What is drawn and written of a run at its end: section `report`."""

from __future__ import annotations

from pydantic import Field

from .base import Section


class ReportConfig(Section):
    embeddings: bool = Field(description="draw maps of the embeddings at the end of `run`")
    html: bool = Field(description="write the page report.html at the end of `run`")
