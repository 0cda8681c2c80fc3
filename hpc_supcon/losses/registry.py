"""The losses by name: how each is built, which output of the model it reads, and what it needs of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from ..errors import ConfigError, unknown_name
from ..parts import find
from .contrastive import SimCLRLoss, SupConLoss, TCLLoss
from .dino import DINOLoss
from .moco import MoCoLoss
from .own_loss import OwnLoss
from .pointwise import CrossEntropyLoss, CrossEntropyMAELoss, ReconstructionLoss
from .predictive import BYOLLoss, SimSiamLoss
from .redundancy import BarlowTwinsLoss, VICRegLoss
from .swav import SwAVLoss
from .triplet import TripletLoss

Head = Literal["projection", "prediction", "features", "classifier", "decoder"]
"""Outputs of a pre-training model: embeddings (of unit length, unless a loss reads them raw), the predictor's
embeddings, the encoder's features, logits, images in -1..1."""
Output = Literal[Head, "target"]
"""What a loss may read: a head, or the projection of the momentum target."""


@dataclass(frozen=True)
class LossSpec:
    """One entry of LOSSES."""

    factory: Callable[..., nn.Module]
    """The loss's class, or a partial of it. Its keyword arguments are the settings that the loss takes."""
    head: Head
    """The output of the model that the loss reads."""
    contrastive: bool = False
    """Made of `pairwise_stats`: compares the embeddings of all ranks and accepts a queue of past embeddings."""
    uses_labels: bool = True
    """Tells the classes of images apart, unless loss.supervised is false."""
    needs_pairs: bool = False
    """An image needs a second view, or another image of its class in the batch."""
    of_views: bool = False
    """Compares the views of images, without labels and without `pairwise_stats`."""
    multi_crop: bool = False
    """Takes more views than the first `global_views`, of another size."""
    other: Output | None = None
    """A second output that the loss reads."""
    raw: bool = False
    """Reads the projection as its last layer leaves it, not scaled to unit length."""
    own: bool = False
    """Of a user's own: see own_loss.py."""

    @property
    def pairwise(self) -> bool:
        """Whether the loss compares images or views with each other; the others (pointwise) average over single
        images."""
        return self.head in ("projection", "prediction", "features")

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the factory's keyword arguments, without those that a partial already sets."""
        preset = self.factory.keywords if isinstance(self.factory, partial) else {}
        found = inspect.signature(self.factory).parameters.values()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return tuple(p.name for p in found if p.kind in named and p.name not in preset)


# `loss.name` -> spec. A new loss is one entry here, one name in the schema of `loss.name` and its own module.
LOSSES: dict[str, LossSpec] = {
    "supcon_out": LossSpec(partial[Any](SupConLoss, form="out"), "projection", contrastive=True, needs_pairs=True),
    "supcon_in": LossSpec(partial[Any](SupConLoss, form="in"), "projection", contrastive=True, needs_pairs=True),
    "tcl": LossSpec(TCLLoss, "projection", contrastive=True, needs_pairs=True),
    "simclr": LossSpec(SimCLRLoss, "projection", contrastive=True, uses_labels=False),
    "barlow_twins": LossSpec(BarlowTwinsLoss, "projection", uses_labels=False, of_views=True, raw=True),
    "vicreg": LossSpec(VICRegLoss, "projection", uses_labels=False, of_views=True, raw=True),
    "simsiam": LossSpec(SimSiamLoss, "prediction", uses_labels=False, of_views=True, other="projection", raw=True),
    "byol": LossSpec(BYOLLoss, "prediction", uses_labels=False, of_views=True, other="target", raw=True),
    "moco_v2": LossSpec(MoCoLoss, "projection", uses_labels=False, of_views=True, other="target"),
    "swav": LossSpec(SwAVLoss, "projection", uses_labels=False, of_views=True, multi_crop=True),
    "dino": LossSpec(DINOLoss, "projection", uses_labels=False, of_views=True, multi_crop=True, other="target"),
    "triplet": LossSpec(TripletLoss, "features", needs_pairs=True),
    "cross_entropy": LossSpec(CrossEntropyLoss, "classifier"),
    "cross_entropy_mae": LossSpec(CrossEntropyMAELoss, "classifier"),
    "reconstruction": LossSpec(ReconstructionLoss, "decoder", uses_labels=False),
}


def loss_spec(name: str) -> LossSpec:
    """The entry of LOSSES, or one of a loss of a user's own, which is imported. Raises ConfigError, with the list of
    names, for a loss that does not exist; PartError, CodeNotAllowed."""
    if (own := find("losses", name, LOSSES)) is not None:
        return LossSpec(partial(OwnLoss, own), "projection", own=True)
    if name not in LOSSES:
        raise ConfigError("loss.name: " + unknown_name("loss", name, LOSSES))
    return LOSSES[name]
