"""Checkpoints: complete or absent, verified on loading, nothing pickled. This package does not depend on training."""

from .load import Checkpoint, list_steps, load_checkpoint, load_newest, mismatch_is_corrupt
from .save import save_checkpoint
from .writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "list_steps",
    "load_checkpoint",
    "load_newest",
    "mismatch_is_corrupt",
    "save_checkpoint",
]
