"""Unstructured pruning: scores of weights by name, scores to masks, weights held at zero, what it saves on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from .scores import l1
from .sparse import load_sparse, measure, save_sparse
from .weight_masks import SCOPES, WeightMasks, build_masks, emptied, masks_digest, pack, prunable, unpack

__all__ = [
    "PRUNERS",
    "SCOPES",
    "WeightMasks",
    "build_masks",
    "emptied",
    "load_sparse",
    "masks_digest",
    "measure",
    "pack",
    "prunable",
    "save_sparse",
    "unpack",
]

PRUNERS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {"l1": l1}
"""`prune.method` -> scores(weights): as `weights`, a number for each weight; the smallest go first."""
