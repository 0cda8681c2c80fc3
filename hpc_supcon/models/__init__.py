"""Encoders, heads and the model that contrastive training wraps."""

from .contrastive import ContrastiveModel
from .encoders import ENCODERS, build_encoder
from .heads import LinearHeads, Projection
from .sync_batchnorm import synchronise_batchnorm

__all__ = [
    "ENCODERS",
    "ContrastiveModel",
    "LinearHeads",
    "Projection",
    "build_encoder",
    "synchronise_batchnorm",
]
