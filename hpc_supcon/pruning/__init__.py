"""Unstructured pruning: scores of weights, masks from scores, weights kept at zero by masks, and sparse files."""

from .scores import PRUNERS
from .sparse import load_sparse, measure, save_sparse, write_sparse
from .weight_masks import SCOPES, WeightMasks, build_masks, fully_pruned, masks_digest, pack, prunable, unpack

__all__ = [
    "PRUNERS",
    "SCOPES",
    "WeightMasks",
    "build_masks",
    "fully_pruned",
    "load_sparse",
    "masks_digest",
    "measure",
    "pack",
    "prunable",
    "save_sparse",
    "unpack",
    "write_sparse",
]
