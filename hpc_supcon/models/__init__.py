"""Encoders, heads, and the model that pre-training optimizes."""

from .activation_checkpointing import apply_activation_checkpointing, frozen_running_statistics
from .build import PretrainingModel, adapt, build_head, build_model, build_without_adapters, merged
from .determinism import check_deterministic
from .encoders import ENCODERS, build_encoder, check_sizes
from .freezing import train_only
from .heads import (
    NORMS,
    ConvDecoder,
    Heads,
    LinearHeads,
    Logistic,
    Mlp,
    Predictor,
    Projection,
    SingleHead,
    build_decoder,
)
from .sync_batchnorm import synchronize_batchnorm
from .weights import LoadedWeights, load_weights
from .widths import set_widths

__all__ = [
    "ENCODERS",
    "NORMS",
    "ConvDecoder",
    "Heads",
    "LinearHeads",
    "LoadedWeights",
    "Logistic",
    "Mlp",
    "Predictor",
    "PretrainingModel",
    "Projection",
    "SingleHead",
    "adapt",
    "apply_activation_checkpointing",
    "build_decoder",
    "build_encoder",
    "build_head",
    "build_model",
    "build_without_adapters",
    "check_deterministic",
    "check_sizes",
    "frozen_running_statistics",
    "load_weights",
    "merged",
    "set_widths",
    "synchronize_batchnorm",
    "train_only",
]
