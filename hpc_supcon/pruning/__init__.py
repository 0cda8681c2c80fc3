"""Pruning: scores of weights, masks from scores, rates that grow, weights kept at zero, and sparse files."""

from .gradual import GradualPruning, cubic_rate
from .scores import PRUNERS, PrunerSpec, PruneTask, Scored, score_weights
from .selection import SCOPES, build_masks, fully_pruned, misfits
from .semi_structured import to_semi_structured
from .sensitivity import Sensitivity, allocate, allocate_rates, scan_layers
from .sparse import load_sparse, measure, save_sparse, write_sparse
from .weight_masks import WeightMasks, masks_digest, pack, prunable, unpack

__all__ = [
    "PRUNERS",
    "SCOPES",
    "GradualPruning",
    "PruneTask",
    "PrunerSpec",
    "Scored",
    "Sensitivity",
    "WeightMasks",
    "allocate",
    "allocate_rates",
    "build_masks",
    "cubic_rate",
    "fully_pruned",
    "load_sparse",
    "masks_digest",
    "measure",
    "misfits",
    "pack",
    "prunable",
    "save_sparse",
    "scan_layers",
    "score_weights",
    "to_semi_structured",
    "unpack",
    "write_sparse",
]
