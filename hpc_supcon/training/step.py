"""One training step: views, one forward pass over all of them, the global loss, backward, update.

With `micro_batch_size` the step takes two passes, which give the same gradient with the memory of one piece: every
piece is embedded without a graph, one loss is computed over all embeddings, and then each piece is embedded again to
backpropagate its part of the gradient into the weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch, ImageViews
from ..distributed.collectives import all_sum, world_size
from ..models import frozen_running_statistics
from ..phases import BACKWARD, ENCODER, LOSS, PROJECTION, on_gradient, phase
from ..seeding import stream
from .gradual import prune_gradually
from .state import FiniteCheck, StepOptions, TrainState


@dataclass(frozen=True)
class StepResult:
    """The results of one step, all detached."""

    loss: Tensor
    """Over the global batch, 0-dim."""
    gradient_norm: Tensor
    """Before clipping, 0-dim."""
    outputs: dict[str, Tensor]
    """The outputs of this rank's model by head, [B, V, ...], and those of momentum encoders: "target", "keys"."""


def train_step(state: TrainState, batch: Batch, options: StepOptions) -> StepResult:
    """Train on this rank's share of one global batch. Collective.

    Raises NonFinite when loss or gradients are NaN or Inf: for this step, before the update, or with
    `options.defer_finite_check` for the step before.
    """
    n_images = len(batch.images)
    size = options.micro_batch_size or n_images
    pieces = [slice(start, min(start + size, n_images)) for start in range(0, n_images, size)]
    torch.manual_seed(stream(options.seed, "layers", options.rank, state.step))
    # drawn once for the whole batch: the views do not depend on how it is cut into pieces
    with phase("views"):
        state.views.reseed(stream(options.seed, "views", options.rank, state.step))
        drawn: Any = state.views.draw(n_images, *batch.images.shape[-2:])

    def views(piece: slice) -> ImageViews:
        with phase("views"):
            own: Any = state.views.select(drawn, piece)
            return state.views.render(batch.images[piece], own)

    compute_gradients = _one_pass if len(pieces) == 1 else _two_passes
    loss, outputs = compute_gradients(state, batch, options, views, pieces)
    with phase("optimizer"):
        norm = _update(state, options, loss, outputs)
    if state.queue is not None:
        with phase("queue"):
            state.queue.update_key_model(state.model)
            state.queue.push(outputs["keys"], batch.labels, options.images_per_rank)
    state.objective.after_step(state.model, outputs, state.step, options.images_per_rank)
    state.step += 1
    if state.gradual is not None:
        with phase("pruning"):
            prune_gradually(state)
    return StepResult(loss, norm, outputs)


def _update(state: TrainState, options: StepOptions, loss: Tensor, outputs: dict[str, Tensor]) -> Tensor:
    """From gradients to new weights; returns the norm of the gradients before clipping."""
    _average_over_ranks(state.objective)
    if state.masks is not None:
        state.masks.apply_to_gradients()
    norm = state.engine.gradient_norm()
    if not _skip_overflow(state, loss, norm):
        with phase("finite check"):
            state.confirm_finite()  # the step before
            state.pending_check = FiniteCheck(state.step + 1, loss, norm, outputs)
            if not options.defer_finite_check:
                state.confirm_finite()
        state.engine.step(norm, options.clip_norm)
        if state.masks is not None:
            state.masks.apply_to_weights()
    if state.ema is not None:
        state.ema.update()
    return norm


Passed = tuple[Tensor, dict[str, Tensor]]
"""(loss, outputs of all pieces); the gradients are in the weights."""


def _one_pass(
    state: TrainState, batch: Batch, options: StepOptions, views: Callable[[slice], ImageViews], pieces: list[slice]
) -> Passed:
    x = views(pieces[0])
    with options.autocast():
        outputs = _beside(state, x, _forward(state.engine.forward, x))
    loss = _loss(state, options, outputs, x, batch.labels, state.engine.backward)
    return loss.detach(), {name: out.detach() for name, out in outputs.items()}


def _two_passes(
    state: TrainState, batch: Batch, options: StepOptions, views: Callable[[slice], ImageViews], pieces: list[slice]
) -> Passed:
    parts, rng_states = [], []
    with torch.no_grad(), frozen_running_statistics(state.model), options.autocast():
        for piece in pieces:
            rng_states.append(_rng_states(state.device))
            x = views(piece)
            parts.append(_beside(state, x, _forward(state.model, x)))
    outputs = {name: torch.cat([p[name] for p in parts]).requires_grad_() for name in parts[0]}
    loss = _loss(state, options, outputs, None, batch.labels, Tensor.backward)
    gradients = {name: out.grad for name, out in outputs.items() if out.grad is not None}
    for piece, rng, is_last in zip(pieces, rng_states, [False] * (len(pieces) - 1) + [True], strict=True):
        _restore_rng(rng, state.device)  # the same dropout as in the first pass
        # ranks average their gradients once, with the last piece
        with nullcontext() if is_last else state.engine.no_sync():
            with options.autocast():
                again = _forward(state.engine.forward, views(piece))
            with phase(ENCODER + BACKWARD):
                # engines backpropagate from a scalar: this one has the given gradients
                scalars = [(again[name] * gradient[piece]).sum() for name, gradient in gradients.items()]
                state.engine.backward(reduce(operator.add, scalars))
    return loss.detach(), {name: out.detach() for name, out in outputs.items()}


def _skip_overflow(state: TrainState, loss: Tensor, norm: Tensor) -> bool:
    """Drop gradients that overflowed in fp16, and lower the loss scale for the next step; whether that was done."""
    if state.engine.scaler is None or bool(torch.isfinite(loss + norm)) or not bool(torch.isfinite(loss)):
        return False
    return state.engine.skip_step()


def _forward(forward: Callable[[ImageViews], dict[str, Tensor]], views: ImageViews) -> dict[str, Tensor]:
    with phase(ENCODER):
        outputs = forward(views)
        for output in outputs.values():
            on_gradient(output, PROJECTION)
        return outputs


def _loss(
    state: TrainState,
    options: StepOptions,
    outputs: dict[str, Tensor],
    views: ImageViews | None,
    labels: Tensor,
    backward: Callable[[Tensor], None],
) -> Tensor:
    """The loss over all ranks; `backward` puts its gradients into the weights or (two passes) into `outputs`."""
    if any(p.requires_grad for p in state.objective.parameters()):
        with phase("finite check"):
            # losses refuse a learned temperature that is NaN; the host reads it in every step anyway
            state.confirm_finite()
    with phase(LOSS):
        loss: Tensor = state.objective(outputs, views, labels, state.queue_columns(), options.images_per_rank)
    with phase(LOSS + BACKWARD):
        backward(state.engine.scale_loss(loss))
    return loss


def _beside(state: TrainState, views: ImageViews, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`outputs` of the model, and what momentum encoders make of the same views: "target" of losses, "keys"."""
    outputs = outputs | state.objective.momentum_outputs(state.model, views)
    if state.queue is None:
        return outputs
    assert isinstance(views, Tensor)  # see config.check_views
    with phase("queue"):
        return outputs | {"keys": state.queue.keys(views, outputs["projection"])}


def _rng_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _restore_rng(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _average_over_ranks(objective: nn.Module) -> None:
    """Average the gradients of the loss's own parameters (a learned temperature), which the data-parallel wrapper
    does not contain."""
    for p in objective.parameters():
        if p.grad is not None and world_size() > 1:
            p.grad.copy_(all_sum(p.grad) / world_size())
