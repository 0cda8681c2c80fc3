"""One training step: views, one forward pass over all of them, the global loss, backward, update.

With `micro_batch_size` the step is done in two passes, which give the same gradient on the memory of one
piece: every piece is embedded without a graph, one loss is taken over all embeddings, and each piece is
embedded again to carry its part of the gradient on into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..collectives import all_sum, gather_objects, world_size
from ..data import Batch
from ..errors import NonFinite
from .optim import clip_gradients
from .state import TrainState


@dataclass(frozen=True)
class StepResult:
    """Of one step: loss over the global batch and gradient norm (0-dim), and what the heads gave (detached)."""

    loss: Tensor
    gradient_norm: Tensor
    """Before clipping."""
    outputs: dict[str, Tensor]


def train_step(state: TrainState, batch: Batch) -> StepResult:
    """Train on this rank's share of one global batch. Raises NonFinite before the update."""
    whole = len(batch.images)
    size = state.micro_batch_size or whole
    # drawn once for the whole batch: how it is cut into pieces changes no view
    drawn = state.views.draw(whole, *batch.images.shape[-2:])
    pieces = [slice(a, min(a + size, whole)) for a in range(0, whole, size)]

    def views(piece: slice) -> Tensor:
        return state.views.render(batch.images[piece], state.views.select(drawn, piece))

    loss, outputs, keys = (_one_pass if len(pieces) == 1 else _two_passes)(state, batch, views, pieces)
    _average_over_ranks(state.objective)
    gradients = [p.grad for p in state.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not torch.isfinite(loss + norm):
        _raise_non_finite(state, loss, outputs)
    if state.clip_norm is not None:
        clip_gradients(gradients, norm, state.clip_norm)
    state.optimiser.step()
    state.optimiser.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update()
    if state.queue is not None:
        state.queue.follow(state.model)
        state.queue.push(torch.cat(keys), batch.labels)
    state.step += 1
    return StepResult(loss, norm, outputs)


Passed = tuple[Tensor, dict[str, Tensor], list[Tensor]]
"""(loss, outputs of all pieces, keys for the queue)."""


def _one_pass(state: TrainState, batch: Batch, views: Callable[[slice], Tensor], pieces: list[slice]) -> Passed:
    x = views(pieces[0])
    with state.autocast():
        outputs = state.parallel(x)
        keys = _keys(state, x, outputs)
    loss = state.objective(outputs, x, batch.labels, state.queue_columns())
    loss.backward()
    return loss.detach(), {name: out.detach() for name, out in outputs.items()}, keys


def _two_passes(state: TrainState, batch: Batch, views: Callable[[slice], Tensor], pieces: list[slice]) -> Passed:
    parts, keys, generators = [], [], []
    with torch.no_grad(), _untouched_statistics(state.model), state.autocast():
        for piece in pieces:
            generators.append(_generator_states(state.device))
            x = views(piece)
            parts.append(state.model(x))
            keys += _keys(state, x, parts[-1])
    outputs = {name: torch.cat([p[name] for p in parts]).requires_grad_() for name in parts[0]}
    loss = state.objective(outputs, None, batch.labels, state.queue_columns())
    loss.backward()
    gradients = {name: out.grad for name, out in outputs.items() if out.grad is not None}
    for piece, generator, is_last in zip(pieces, generators, [False] * (len(pieces) - 1) + [True], strict=True):
        _restore_generators(generator, state.device)  # the same dropout as in the first pass
        # ranks exchange gradients once, with the last piece
        with nullcontext() if is_last else _without_exchange(state.parallel), state.autocast():
            again = state.parallel(views(piece))
            torch.autograd.backward(list(again.values()), [gradients[name][piece] for name in again])
    return loss.detach(), {name: out.detach() for name, out in outputs.items()}, keys


def _keys(state: TrainState, views: Tensor, outputs: dict[str, Tensor]) -> list[Tensor]:
    return [] if state.queue is None else [state.queue.keys(views, outputs["projection"])]


def _without_exchange(parallel: nn.Module) -> AbstractContextManager[None]:
    return parallel.no_sync() if isinstance(parallel, DistributedDataParallel) else nullcontext()


@contextmanager
def _untouched_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics are moved by the second pass alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


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


def _raise_non_finite(state: TrainState, loss: Tensor, outputs: dict[str, Tensor]) -> None:
    # Loss and averaged gradients are equal on all ranks, so all of them come here and may talk.
    finite = gather_objects(all(bool(torch.isfinite(out).all()) for out in outputs.values()))
    broken = [str(r) for r, ok in enumerate(finite) if not ok]
    what = f"outputs of rank {', '.join(broken)}" if broken else "gradients" if loss.isfinite() else "loss"
    raise NonFinite(
        f"step {state.step}: {what} became NaN or Inf (loss {float(loss):g}); stopped before the update. "
        "Lower optim.lr, warm up longer, or try train.precision=fp32"
    )
