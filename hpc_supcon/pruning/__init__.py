"""Pruning: scores of weights, masks from scores, rates that grow, weights kept at zero, and sparse files.

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
from .gradual import GradualPruning, cubic_rate
from .obs import BlockFisher, BlockInverse, improve_compensation, removal_scores
from .scores import PRUNERS, PrunerSpec, PruneTask, Scored, score_weights
from .second_order import FisherSettings, FisherTask
from .selection import SCOPES, build_masks, fully_pruned, misfits
from .semi_structured import to_semi_structured
from .sensitivity import Sensitivity, allocate, allocate_rates, scan_layers
from .sparse import load_sparse, measure, save_sparse, write_sparse
from .weight_masks import WeightMasks, masks_digest, pack, prunable, unpack

__all__ = [
    "PRUNERS",
    "SCOPES",
    "BlockFisher",
    "BlockInverse",
    "Categorical",
    "FisherSettings",
    "FisherTask",
    "Gaussian",
    "GradualPruning",
    "InverseFisher",
    "ModelFisher",
    "PruneTask",
    "PrunerSpec",
    "Scored",
    "Sensitivity",
    "WeightMasks",
    "allocate",
    "allocate_rates",
    "build_masks",
    "contrastive_outputs",
    "contrastive_targets",
    "cubic_rate",
    "fully_pruned",
    "improve_compensation",
    "load_sparse",
    "masks_digest",
    "mean_diagonal",
    "mean_over_ranks",
    "measure",
    "misfits",
    "pack",
    "prunable",
    "removal_scores",
    "save_sparse",
    "scan_layers",
    "score_weights",
    "to_semi_structured",
    "unpack",
    "write_sparse",
]
