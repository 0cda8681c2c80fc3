"""Losses: contrastive and triplet losses over the images of all ranks, and losses of single images."""

from __future__ import annotations

from .contrastive import SimCLRLoss, SupConLoss, TCLLoss
from .diagnostics import (
    GradientResponse,
    alignment_and_uniformity,
    effective_rank,
    gradient_response,
    mean_similarity,
)
from .pairwise import PairwiseStats, global_mean, pairwise_stats
from .pointwise import CrossEntropyLoss, CrossEntropyMAELoss, ReconstructionLoss
from .registry import LOSSES, LossSpec, loss_spec
from .triplet import TripletLoss

__all__ = [
    "LOSSES",
    "CrossEntropyLoss",
    "CrossEntropyMAELoss",
    "GradientResponse",
    "LossSpec",
    "PairwiseStats",
    "ReconstructionLoss",
    "SimCLRLoss",
    "SupConLoss",
    "TCLLoss",
    "TripletLoss",
    "alignment_and_uniformity",
    "effective_rank",
    "global_mean",
    "gradient_response",
    "loss_spec",
    "mean_similarity",
    "pairwise_stats",
]
