"""Maps of embeddings, RUN_DIR/embeddings/*.npz, as they go into a page: two bytes for a coordinate."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blobs import Blobs
from .read import Run
from .thumbnails import JSON, read_thumbnails

FOLDER = "embeddings"
SPACES, METHODS = ("projection", "encoder", "pixels"), ("tsne", "umap", "pca")
"""Those shown first come first."""
MAX_POINTS = 20_000
"""Points of a map in a page; of more, every n-th is taken."""
_NAME = re.compile(rf"(?:(initial)-|step-(\d{{1,12}})-)?({'|'.join(SPACES)})-({'|'.join(METHODS)})")
NO_LABELS = "no labels"
"""In place of classes."""
_LEVELS = 65535


@dataclass(frozen=True)
class Map:
    """One file of points. step: of the weights, 0 before training, None at the end. shape: width / height."""

    space: str
    method: str
    step: int | None
    points: NDArray[np.uint16]
    """[n, 2] in 0..65535, within the rectangle of all points."""
    index: NDArray[np.uint32]
    labels: NDArray[np.uint16]
    classes: list[str]
    total: int
    shape: float
    labeled: bool = True


def read_maps(run: Run) -> list[Map]:
    """Of a run, the preferred first. Files that cannot be read become notices of the run."""
    folder, maps = run.folder / FOLDER, []
    for path in sorted(folder.glob("*.npz")):
        name = _NAME.fullmatch(path.stem)
        if name is None:
            continue
        step = 0 if name[1] else int(name[2]) if name[2] else None
        try:
            maps.append(_read(path, name[3], name[4], step, run))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            run.notices.append(f"{path}: not a map of points: {error}")
    return sorted(maps, key=lambda m: (m.step is not None, METHODS.index(m.method), SPACES.index(m.space), m.step))


def _read(path: Path, space: str, method: str, step: int | None, run: Run) -> Map:
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        points, index, labels = (np.asarray(file[key]) for key in ("points", "index", "labels"))
        classes = [str(name) for name in file["classes"]] if "classes" in file else []
        labeled = "classes" not in file or bool(classes)
    total = len(points)
    if points.shape != (total, 2) or index.shape != (total,) or labels.shape != (total,) or not total:
        raise ValueError(f"points {points.shape}, index {index.shape}, labels {labels.shape}")
    if not (np.issubdtype(index.dtype, np.integer) and np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(f"index is {index.dtype} and labels are {labels.dtype}, not integers")
    points = points.astype(np.float64)
    shown = np.isfinite(points).all(axis=1) & (labels >= 0) & (labels <= _LEVELS) & (index >= 0)
    if not shown.all():
        run.notices.append(f"{path}: {total - int(shown.sum())} of {total} points have no place and are left out")
    if not shown.any():
        raise ValueError("no point has a place")
    points, index, labels = points[shown], index[shown], labels[shown]
    every = -(-len(points) // MAX_POINTS)
    points, index, labels = points[::every], index[::every], labels[::every]
    low = points.min(axis=0)
    extent = np.maximum(points.max(axis=0) - low, 1e-12)
    scaled = np.rint((points - low) / extent * _LEVELS).astype(np.uint16)
    if not labeled:
        classes, labels = [NO_LABELS], np.zeros_like(labels)
    classes += [str(i) for i in range(len(classes), int(labels.max()) + 1)]
    shape = float(np.clip(extent[0] / extent[1], 0.2, 5.0))
    found = scaled, index.astype(np.uint32), labels.astype(np.uint16)
    return Map(space, method, step, *found, classes, total, shape, labeled)


def maps_data(run: Run, blobs: Blobs) -> list[dict[str, Any]]:
    """The maps of a run for the page's script, without those for which `blobs` has no room."""
    found = []
    for one in read_maps(run):
        keys = [
            blobs.add(values.astype(kind).tobytes())
            for values, kind in ((one.points, "<u2"), (one.index, "<u4"), (one.labels, "<u2"))
        ]
        if None in keys:
            run.notices.append(f"{run.folder}: not all maps are in the page, which would be too large")
            break
        points, index, labels = keys
        found.append(
            {
                "space": one.space, "method": one.method, "step": one.step, "points": points, "index": index,
                "labels": labels, "classes": one.classes, "n": len(one.points), "total": one.total,
                "shape": one.shape, "labeled": one.labeled,
            }
        )  # fmt: skip
    return found


def thumbnails_data(run: Run, blobs: Blobs) -> dict[str, Any] | None:
    """The thumbnails of a run for the page's script; None where there are none, or `blobs` has no room."""
    folder = run.folder / FOLDER
    try:
        found = read_thumbnails(folder)
    except (OSError, ValueError, RecursionError) as error:
        run.notices.append(f"{folder / JSON}: {error}")
        return None
    if found is None:
        return None
    picture, index = blobs.add(found.webp), blobs.add(found.index.astype("<u4").tobytes())
    if picture is None or index is None:
        run.notices.append(f"{run.folder}: its images are not in the page, which would be too large")
        return None
    return {"picture": picture, "index": index, "tile": found.tile, "columns": found.columns}
