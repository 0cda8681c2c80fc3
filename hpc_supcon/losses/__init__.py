"""Losses: contrastive and triplet losses over the images of all ranks, and losses of single images."""

from __future__ import annotations

from .contrastive import SimCLRLoss, SupConLoss, TCLLoss
from .diagnostics import (
    GradientResponse,
    alignment_and_uniformity,
    effective_rank,
    embedding_std,
    gradient_response,
    mean_similarity,
)
from .dino import DINOLoss
from .moco import MoCoLoss
from .pairwise import PairwiseStats, global_mean, pairwise_stats
from .pointwise import CrossEntropyLoss, CrossEntropyMAELoss, ReconstructionLoss
from .predictive import BYOLLoss, SimSiamLoss
from .redundancy import BarlowTwinsLoss, VICRegLoss
from .registry import LOSSES, LossSpec, loss_spec
from .swav import SwAVLoss
from .triplet import TripletLoss

__all__ = [
    "LOSSES",
    "BYOLLoss",
    "BarlowTwinsLoss",
    "CrossEntropyLoss",
    "CrossEntropyMAELoss",
    "DINOLoss",
    "GradientResponse",
    "LossSpec",
    "MoCoLoss",
    "PairwiseStats",
    "ReconstructionLoss",
    "SimCLRLoss",
    "SimSiamLoss",
    "SupConLoss",
    "SwAVLoss",
    "TCLLoss",
    "TripletLoss",
    "VICRegLoss",
    "alignment_and_uniformity",
    "effective_rank",
    "embedding_std",
    "global_mean",
    "gradient_response",
    "loss_spec",
    "mean_similarity",
    "pairwise_stats",
]
