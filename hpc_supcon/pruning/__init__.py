"""Pruning: scores of weights, masks, rates that grow, removed channels, sparse files, and costs that are left.

Second-order scores and the changes that compensate for removed weights come from an inverse Fisher matrix:
BlockFisher (diagonal or in blocks) or InverseFisher (learned), of products and gradients of ModelFisher.
"""

from .channel_graph import ChannelGraph, trace_channels
from .channels import (
    Plan,
    apply_plan,
    channel_plan,
    channel_scores,
    check_plan,
    layer_widths,
    mask_channels,
    plan_digest,
)
from .cost import count_macs, measure_latency
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
from .scores import CHANNEL_SCORES, PRUNERS, PrunerSpec, PruneTask, Scored, score_weights
from .second_order import FisherSettings, FisherTask
from .selection import SCOPES, build_masks, fully_pruned, misfits
from .semi_structured import to_semi_structured
from .sensitivity import Sensitivity, allocate, allocate_rates, scan_layers
from .sparse import VALUES, load_sparse, measure, save_sparse, write_sparse
from .weight_masks import WeightMasks, masks_digest, pack, prunable, unpack

__all__ = [
    "CHANNEL_SCORES",
    "PRUNERS",
    "SCOPES",
    "VALUES",
    "BlockFisher",
    "BlockInverse",
    "Categorical",
    "ChannelGraph",
    "FisherSettings",
    "FisherTask",
    "Gaussian",
    "GradualPruning",
    "InverseFisher",
    "ModelFisher",
    "Plan",
    "PruneTask",
    "PrunerSpec",
    "Scored",
    "Sensitivity",
    "WeightMasks",
    "allocate",
    "allocate_rates",
    "apply_plan",
    "build_masks",
    "channel_plan",
    "channel_scores",
    "check_plan",
    "contrastive_outputs",
    "contrastive_targets",
    "count_macs",
    "cubic_rate",
    "fully_pruned",
    "improve_compensation",
    "layer_widths",
    "load_sparse",
    "mask_channels",
    "masks_digest",
    "mean_diagonal",
    "mean_over_ranks",
    "measure",
    "measure_latency",
    "misfits",
    "pack",
    "plan_digest",
    "prunable",
    "removal_scores",
    "save_sparse",
    "scan_layers",
    "score_weights",
    "to_semi_structured",
    "trace_channels",
    "unpack",
    "write_sparse",
]
