"""Encoders, heads and the model that pre-training wraps."""

from .activation_checkpointing import recompute_activations, untouched_statistics
from .build import PretrainingModel, build_head, build_model
from .encoders import ENCODERS, build_encoder
from .heads import ConvDecoder, Heads, LinearHeads, Logistic, Mlp, Projection, SingleHead, build_decoder
from .sync_batchnorm import synchronize_batchnorm
from .weights import LoadedWeights, load_weights

__all__ = [
    "ENCODERS",
    "ConvDecoder",
    "Heads",
    "LinearHeads",
    "LoadedWeights",
    "Logistic",
    "Mlp",
    "PretrainingModel",
    "Projection",
    "SingleHead",
    "build_decoder",
    "build_encoder",
    "build_head",
    "build_model",
    "load_weights",
    "recompute_activations",
    "synchronize_batchnorm",
    "untouched_statistics",
]
