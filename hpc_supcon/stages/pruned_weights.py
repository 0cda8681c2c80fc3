"""Which weights of a model are pruned: the masks of every rate, the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..config import Config
from ..distributed.collectives import gather_objects, propagate_errors
from ..distributed.launch import Runtime
from ..errors import RunFolderError
from ..evaluation.prune_task import prune_task
from ..models import PretrainingModel
from ..pruning import (
    InverseFisher,
    Plan,
    build_masks,
    fully_pruned,
    masks_digest,
    misfits,
    prunable,
    score_weights,
    unpack,
)
from ..terminal import warn
from ..training.data import Data

Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """A model that is pruned, and the checkpoint that it was loaded from."""

    model: PretrainingModel
    found: checkpoint.Checkpoint

    @property
    def masks(self) -> Masks:
        """Of its weights that are pruned already: all True where none is."""
        packed = self.found.tensors.get("masks", {})
        return {
            name: unpack(packed[name], tuple(weight.shape))
            if name in packed
            else torch.ones(weight.shape, dtype=torch.bool)
            for name, weight in prunable(self.model.encoder).items()
        }


@dataclass(frozen=True)
class Selection:
    """The weights that one rate prunes."""

    masks: Masks
    values: Masks
    """New values of weights, by a method that compensates for those that are pruned."""
    plan: Plan | None = None
    """The channels that are kept, by prune.method=channels; `masks` are then those of the narrower model."""
    learned: InverseFisher | None = None
    """By a method that learns, for the next round."""


def select(
    folder: Path,
    config: Config,
    rates: tuple[float, ...],
    runtime: Runtime,
    data: Data,
    trained: Trained,
    learned: InverseFisher | None = None,
) -> dict[float, Selection]:
    """What each of `rates` prunes of a model; learned: of the round before. Collective.

    Raises RunFolderError, on all ranks, where the masks of one differ: the ranks would train different models."""
    settings, before = config.prune, trained.masks
    with prune_task(folder, config, runtime, data, trained.model, trained.found, learned) as task:
        scored = score_weights(settings.method, task)
    scope = settings.pattern or settings.scope
    selected = {}
    with propagate_errors():
        for rate in rates:
            counts = None if scored.counts is None else scored.counts(rate)
            masks = build_masks(scored.scores, rate, scope, pruned=before, counts=counts)
            values = {} if scored.compensate is None else scored.compensate(masks)
            selected[rate] = Selection(masks, values, learned=scored.learned)
    check_same_masks(folder, {rate: selection.masks for rate, selection in selected.items()})
    return selected


def check_same_masks(folder: Path, masks_by_rate: dict[float, Masks]) -> None:
    check_same(folder, [masks_digest(masks) for masks in masks_by_rate.values()])


def check_same(folder: Path, digests: list[str]) -> None:
    """Raise RunFolderError, on all ranks, where one has other digests than rank 0. Collective."""
    gathered = gather_objects(digests)
    different = [str(rank) for rank, own in enumerate(gathered) if own != gathered[0]]
    if different:
        raise RunFolderError(
            f"{folder}: ranks {', '.join(different)} read other weights than rank 0: nothing was pruned"
        )


def warn_of_masks(config: Config, rate: float, before: Trained, masks: Masks) -> None:
    """Warnings, not errors, for what the user may not expect."""
    settings = config.prune
    if names := fully_pruned(masks):  # residual connections may carry the features past a layer without weights
        warn(f"prune.rate={rate:g} leaves nothing of {_some(names)}")
    if settings.pattern is not None and (names := misfits(masks, settings.pattern[1])):
        warn(
            f"prune.scope={settings.scope}: not pruned, because {settings.pattern[1]} does not divide their input "
            f"channels: {_some(names)}"
        )
    total = sum(mask.numel() for mask in masks.values())
    pruned = total - sum(int(mask.sum()) for mask in before.masks.values())
    if settings.pattern is None and pruned > round(rate * total):
        warn(f"prune.rate={rate:g}, but {pruned / total:.4g} of the weights are pruned already: they stay pruned")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
