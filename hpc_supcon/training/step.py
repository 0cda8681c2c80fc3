"""One training step: views, one forward pass over all of them, the global loss, backward, update.

With `micro_batch_size` the step is done in two passes, which give the same gradient on the memory of one
piece: every piece is embedded without a graph, one loss is taken over all embeddings, and each piece is
embedded again to carry its part of the gradient on into the weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from ..data import Batch
from ..distributed.collectives import all_sum, world_size
from ..models import frozen_running_statistics
from ..phases import BACKWARD, ENCODER, LOSS, PROJECTION, on_gradient, phase
from .state import TrainState


@dataclass(frozen=True)
class StepResult:
    """Of one step: loss over the global batch and gradient norm (0-dim), and what the heads gave (detached)."""

    loss: Tensor
    gradient_norm: Tensor
    """Before clipping."""
    outputs: dict[str, Tensor]


def train_step(state: TrainState, batch: Batch) -> StepResult:
    """Train on this rank's share of one global batch. Raises NonFinite as guard.py says."""
    with phase("guard"):
        state.guard.begin(state.changing)
    whole = len(batch.images)
    size = state.micro_batch_size or whole
    # drawn once for the whole batch: how it is cut into pieces changes no view
    with phase("views"):
        drawn = state.views.draw(whole, *batch.images.shape[-2:])
    pieces = [slice(a, min(a + size, whole)) for a in range(0, whole, size)]

    def views(piece: slice) -> Tensor:
        with phase("views"):
            return state.views.render(batch.images[piece], state.views.select(drawn, piece))

    loss, outputs, keys = (_one_pass if len(pieces) == 1 else _two_passes)(state, batch, views, pieces)
    with phase("optimizer"):
        norm = _update(state, loss, outputs)
    if state.queue is not None:
        with phase("queue"):
            state.queue.follow(state.model)
            state.queue.push(torch.cat(keys), batch.labels, state.images_per_rank)
    with phase("guard"):
        state.guard.end()
    state.step += 1
    return StepResult(loss, norm, outputs)


def _update(state: TrainState, loss: Tensor, outputs: dict[str, Tensor]) -> Tensor:
    """From gradients to new weights; returns the gradients' norm before clipping."""
    _average_over_ranks(state.objective)
    if state.masks is not None:
        state.masks.apply_to_gradients()
    norm = state.engine.gradient_norm()
    if not _overflowed(state, loss, norm):
        with phase("guard"):
            state.guard.check(state.step + 1, loss, norm, outputs)
        state.engine.step(norm, state.clip_norm)
        if state.masks is not None:
            state.masks.apply_to_weights()
    if state.ema is not None:
        state.ema.update()
    return norm


Passed = tuple[Tensor, dict[str, Tensor], list[Tensor]]
"""(loss, outputs of all pieces, keys for the queue)."""


def _one_pass(state: TrainState, batch: Batch, views: Callable[[slice], Tensor], pieces: list[slice]) -> Passed:
    x = views(pieces[0])
    with state.autocast():
        outputs = _forward(state.engine.forward, x)
        keys = _keys(state, x, outputs)
    loss = _loss(state, outputs, x, batch.labels, state.engine.backward)
    return loss.detach(), {name: out.detach() for name, out in outputs.items()}, keys


def _two_passes(state: TrainState, batch: Batch, views: Callable[[slice], Tensor], pieces: list[slice]) -> Passed:
    parts, keys, generators = [], [], []
    with torch.no_grad(), frozen_running_statistics(state.model), state.autocast():
        for piece in pieces:
            generators.append(_generator_states(state.device))
            x = views(piece)
            parts.append(_forward(state.model, x))
            keys += _keys(state, x, parts[-1])
    outputs = {name: torch.cat([p[name] for p in parts]).requires_grad_() for name in parts[0]}
    loss = _loss(state, outputs, None, batch.labels, Tensor.backward)
    gradients = {name: out.grad for name, out in outputs.items() if out.grad is not None}
    for piece, generator, is_last in zip(pieces, generators, [False] * (len(pieces) - 1) + [True], strict=True):
        _restore_generators(generator, state.device)  # the same dropout as in the first pass
        # ranks exchange gradients once, with the last piece
        with nullcontext() if is_last else state.engine.no_exchange():
            with state.autocast():
                again = _forward(state.engine.forward, views(piece))
            with phase(ENCODER + BACKWARD):
                # a number whose gradient is the given one: engines take nothing else
                pulled = [(again[name] * gradient[piece]).sum() for name, gradient in gradients.items()]
                state.engine.backward(reduce(operator.add, pulled))
    return loss.detach(), {name: out.detach() for name, out in outputs.items()}, keys


def _overflowed(state: TrainState, loss: Tensor, norm: Tensor) -> bool:
    """Whether gradients went beyond fp16, and are forgotten with another scale for the next step."""
    if state.engine.scaler is None or bool(torch.isfinite(loss + norm)) or not bool(torch.isfinite(loss)):
        return False
    return state.engine.skip()


def _forward(forward: Callable[[Tensor], dict[str, Tensor]], views: Tensor) -> dict[str, Tensor]:
    with phase(ENCODER):
        outputs = forward(views)
        for output in outputs.values():
            on_gradient(output, PROJECTION)
        return outputs


def _loss(
    state: TrainState,
    outputs: dict[str, Tensor],
    views: Tensor | None,
    labels: Tensor,
    backward: Callable[[Tensor], None],
) -> Tensor:
    """The loss over all ranks, its gradients left in weights or (two passes) `outputs` by `backward`."""
    with phase(LOSS):
        loss: Tensor = state.objective(outputs, views, labels, state.queue_columns(), state.images_per_rank)
    with phase(LOSS + BACKWARD):
        backward(state.engine.scaled(loss))
    return loss


def _keys(state: TrainState, views: Tensor, outputs: dict[str, Tensor]) -> list[Tensor]:
    if state.queue is None:
        return []
    with phase("queue"):
        return [state.queue.keys(views, outputs["projection"])]


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _restore_generators(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _average_over_ranks(objective: nn.Module) -> None:
    """The loss's own parameters (a learned temperature) are outside the data-parallel wrapper."""
    for p in objective.parameters():
        if p.grad is not None and world_size() > 1:
            p.grad.copy_(all_sum(p.grad) / world_size())
