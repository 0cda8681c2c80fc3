"""Pruning between two steps of training: new masks, for all that follows the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed.collectives import all_sum, propagate_errors, rank
from ..pruning import WeightMasks, pack, prunable, unpack
from .state import TrainState


@torch.no_grad()
def prune_gradually(state: TrainState) -> None:
    """Prune to the rate of `state.gradual`, where that is due after the last step. Collective.

    All ranks take rank 0's masks. Weight average, momentum encoder and the optimizer's state are pruned as well, so
    that they are as if training had started with these masks. Raises NonFinite.
    """
    gradual = state.gradual
    if gradual is None or not gradual.due(state.step):
        return
    state.confirm_finite()
    encoder = state.model.encoder
    weights = prunable(encoder)
    before = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
    if state.masks is not None:
        packed = state.masks.packed()
        before = {name: unpack(packed[name], tuple(weight.shape)) for name, weight in weights.items()}
    with propagate_errors():
        masks = gradual.masks(state.step, weights, before)
    masks = {name: unpack(_from_rank_0(pack(mask), state), tuple(mask.shape)) for name, mask in masks.items()}
    state.masks = WeightMasks(encoder, masks)
    if state.ema is not None:
        state.ema.prune({f"encoder.{name}": mask for name, mask in masks.items()})
    if state.queue is not None and state.queue.key_model is not None:
        WeightMasks(state.queue.key_model.encoder, masks)
    for full_name, slot in state.engine.tensors().items():  # the optimizer's own tensors
        name = full_name.rpartition("/")[0].removeprefix("encoder.")
        if name in masks and slot.shape == masks[name].shape:
            slot.masked_fill_(~masks[name].to(slot.device), 0.0)


def _from_rank_0(packed: Tensor, state: TrainState) -> Tensor:
    own = packed if rank() == 0 else torch.zeros_like(packed)
    return all_sum(own.to(state.device)).cpu()
