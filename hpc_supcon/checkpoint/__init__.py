"""Checkpoints: complete or absent, verified on loading, nothing pickled. Knows tensors and folders, not training."""

from .load import Checkpoint, list_steps, load_checkpoint, load_newest, understood
from .save import save_checkpoint
from .writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "list_steps",
    "load_checkpoint",
    "load_newest",
    "save_checkpoint",
    "understood",
]
