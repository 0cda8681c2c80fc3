"""Unstructured pruning: scores of weights, masks from scores, weights kept at zero by masks, and sparse files."""

from .channel_graph import ChannelGraph, trace_channels
from .channels import (
    apply_plan,
    channel_plan,
    channel_scores,
    check_plan,
    layer_widths,
    mask_channels,
    plan_digest,
)
from .cost import count_macs, measure_latency
from .scores import PRUNERS
from .sparse import load_sparse, measure, save_sparse, write_sparse
from .weight_masks import SCOPES, WeightMasks, build_masks, fully_pruned, masks_digest, pack, prunable, unpack

__all__ = [
    "PRUNERS",
    "SCOPES",
    "ChannelGraph",
    "WeightMasks",
    "apply_plan",
    "build_masks",
    "channel_plan",
    "channel_scores",
    "check_plan",
    "count_macs",
    "fully_pruned",
    "layer_widths",
    "load_sparse",
    "mask_channels",
    "masks_digest",
    "measure",
    "measure_latency",
    "pack",
    "plan_digest",
    "prunable",
    "save_sparse",
    "trace_channels",
    "unpack",
    "write_sparse",
]
