"""Pruning: scores of weights, masks from scores, weights kept at zero by masks, and sparse files.

Second-order scores and the changes that compensate for removed weights come from an inverse Fisher matrix:
BlockFisher (diagonal or in blocks) or InverseFisher (learned), of products and gradients of ModelFisher.
"""

from .fisher import (
    Categorical,
    Gaussian,
    ModelFisher,
    contrastive_outputs,
    contrastive_targets,
    mean_diagonal,
    mean_over_ranks,
)
from .fishleg import InverseFisher
from .obs import BlockFisher, BlockInverse, improve_compensation, removal_scores
from .scores import PRUNERS
from .sparse import load_sparse, measure, save_sparse, write_sparse
from .weight_masks import SCOPES, WeightMasks, build_masks, fully_pruned, masks_digest, pack, prunable, unpack

__all__ = [
    "PRUNERS",
    "SCOPES",
    "BlockFisher",
    "BlockInverse",
    "Categorical",
    "Gaussian",
    "InverseFisher",
    "ModelFisher",
    "WeightMasks",
    "build_masks",
    "contrastive_outputs",
    "contrastive_targets",
    "fully_pruned",
    "improve_compensation",
    "load_sparse",
    "masks_digest",
    "mean_diagonal",
    "mean_over_ranks",
    "measure",
    "pack",
    "prunable",
    "removal_scores",
    "save_sparse",
    "unpack",
    "write_sparse",
]
