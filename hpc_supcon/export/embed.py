"""Embeddings of images as a .npz file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .files import whole_file
from .images import Pictures
from .inference import Outputs, run
from .parts import Part


def embed(part: Part, pictures: Pictures, out: Path, *, force: bool = False, **options: Any) -> Outputs:
    """Write the part's output for all pictures to `out`, which `numpy.load` reads (nothing in it is pickled).

    `embeddings` float32 [n, D] and `paths` (text) [n]; where every picture's class is known also `labels` int64
    [n], into `classes` (text). `options` are those of `inference.run`. Raises as that does, and OutputError.
    """
    outputs = run(part, pictures, **options)
    arrays: dict[str, npt.NDArray[Any]] = {
        "embeddings": outputs.values,
        "paths": np.array([pictures.paths[i] for i in outputs.rows], dtype=np.str_),
    }
    if pictures.labels is not None:
        arrays["labels"] = np.array([pictures.labels[i] for i in outputs.rows], dtype=np.int64)
        arrays["classes"] = np.array(part.classes, dtype=np.str_)
    with whole_file(out, force=force) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's own flag is not among them
    return outputs
