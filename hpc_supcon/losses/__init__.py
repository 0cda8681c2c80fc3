"""Losses: contrastive ones over any number of ranks, triplet, and the plain ones on logits and images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .contrastive import SimCLRLoss, SupConLoss, TCLLoss
from .diagnostics import GradientResponse, gradient_response, mean_similarity
from .pairwise import PairwiseStats, global_mean, pairwise_stats
from .pointwise import CrossEntropyLoss, CrossEntropyMAELoss, ReconstructionLoss
from .triplet import TripletLoss

# `loss.name` -> factory; its keyword arguments are those of the class.
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "supcon_out": partial[Any](SupConLoss, form="out"),
    "supcon_in": partial[Any](SupConLoss, form="in"),
    "tcl": TCLLoss,
    "simclr": SimCLRLoss,
    "triplet": TripletLoss,
    "cross_entropy": CrossEntropyLoss,
    "cross_entropy_mae": CrossEntropyMAELoss,
    "reconstruction": ReconstructionLoss,
}

__all__ = [
    "LOSSES",
    "CrossEntropyLoss",
    "CrossEntropyMAELoss",
    "GradientResponse",
    "PairwiseStats",
    "ReconstructionLoss",
    "SimCLRLoss",
    "SupConLoss",
    "TCLLoss",
    "TripletLoss",
    "global_mean",
    "gradient_response",
    "mean_similarity",
    "pairwise_stats",
]
