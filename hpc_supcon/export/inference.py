"""A part of a model over many images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..errors import DataError
from .images import Pictures, decode
from .parts import Part

Progress = Callable[[str, int, int], None]
"""(what, done, all)."""


@dataclass(frozen=True)
class Outputs:
    values: npt.NDArray[np.float32]
    """[n, D], a row for each image that could be used."""
    rows: tuple[int, ...]
    """Which of the pictures these are."""
    problems: tuple[str, ...]
    """A line for each that could not."""


@torch.no_grad()
def run(
    part: Part,
    pictures: Pictures,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    skip_corrupt: bool = False,
    progress: Progress | None = None,
) -> Outputs:
    """The part's output for every picture, in fp32; leaves the part's module on `device`.

    progress(what, done, all) is called after each batch. Raises as `decode`; DataError where no image can be used.
    """
    model, n = part.whole().to(device), len(pictures.paths)
    values: npt.NDArray[np.float32] | None = None
    rows: list[int] = []
    problems: list[str] = []
    batch_size = min(batch_size, n)
    for batch in decode(pictures.source, batch_size, skip_corrupt=skip_corrupt):
        problems += batch.problems
        if batch.rows:
            # batches of one size: another may take another kernel, and round otherwise
            missing = batch_size - len(batch.rows)
            images = torch.cat([batch.images, batch.images[-1:].expand(missing, -1, -1, -1)])
            out = model(images.to(device)).float()[: len(batch.rows)].cpu().numpy()
            if values is None:
                values = np.empty((n, out.shape[1]), dtype=np.float32)
            values[len(rows) : len(rows) + len(out)] = out
            rows += batch.rows
        if progress is not None:
            progress("images", len(rows) + len(problems), n)
    if values is None:
        raise DataError(f"none of {n} images can be used; the first: {problems[0]}")
    return Outputs(values[: len(rows)], tuple(rows), tuple(problems))
