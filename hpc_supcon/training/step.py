"""One training step: views, one forward pass over all of them, the global loss, backward, update."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import gather_objects
from ..data import Batch
from ..errors import NonFinite
from .state import TrainState


def train_step(state: TrainState, batch: Batch) -> tuple[Tensor, Tensor]:
    """Train on this rank's share of one global batch; (loss over the global batch, gradient norm), scalars."""
    views = state.views(batch.images)
    with state.autocast():
        embeddings = state.parallel(views)
    loss = state.loss(embeddings, batch.labels)
    loss.backward()
    norm = gradient_norm(state)
    if not torch.isfinite(loss.detach() + norm):
        _raise_non_finite(state, loss, embeddings)
    state.optimiser.step()
    state.optimiser.zero_grad(set_to_none=True)
    state.step += 1
    return loss.detach(), norm


def gradient_norm(state: TrainState) -> Tensor:
    """L2 norm of all gradients, averaged over ranks already and so the same on each of them."""
    return torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])


def _raise_non_finite(state: TrainState, loss: Tensor, embeddings: Tensor) -> None:
    # Loss and averaged gradients are equal on all ranks, so all of them come here and may talk.
    finite = gather_objects(bool(torch.isfinite(embeddings.detach()).all()))
    broken = [str(r) for r, ok in enumerate(finite) if not ok]
    what = f"embeddings of rank {', '.join(broken)}" if broken else "loss" if not loss.isfinite() else "gradients"
    raise NonFinite(
        f"step {state.step}: {what} became NaN or Inf (loss {float(loss.detach()):g}); stopped before the update. "
        "Lower optim.lr, warm up longer, or try train.precision=fp32"
    )
