"""Pruning methods by name: what each needs, and the scores of the weights, of which the smallest are pruned first.

A method is a function PruneTask -> Scored and an entry of PRUNERS, which says what the task must offer:

    weights      nothing but the weights; such a method can also be applied within training (see GradualPruning)
    gradients    `model`, `batches` and `gradients`: the model, batches of the training split, and their gradients
    scan         `PruneTask.scan`: the loss on validation with one layer pruned
    fisher       `PruneTask.fisher`: the likelihood whose Fisher information is estimated on the training split

A method that changes the weights that are left returns a function that does so, `Scored.compensate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from .fishleg import InverseFisher
from .second_order import FisherTask, SecondOrder, fishleg, obs_blocks, obs_diagonal
from .sensitivity import Sensitivity, allocate_rates

Tensors = Mapping[str, Tensor]
"""By the name of a weight, a tensor of its shape."""


@dataclass(frozen=True)
class PruneTask:
    """What a method is told about the encoder to prune. `gradients` and `scan` are collective."""

    weights: Tensors
    """The weights that may be pruned (see `prunable`): the encoder's own tensors."""
    seed: int = 0
    """Of the random stream `prune`."""
    model: nn.Module | None = None
    """The encoder with its heads, in eval mode: views [B, V, C, H, W] -> {head: output [B, V, ...]}. The weight NAME
    of `weights` is its parameter encoder.NAME."""
    batches: Callable[[int], tuple[Tensor, Tensor]] | None = None
    """batches(i): views and labels [B] of this rank's share of the i-th global batch of train, from 0 on; the same
    whenever it is called. Cheapest in order."""
    gradients: Callable[[int], Iterator[dict[str, Tensor]]] | None = None
    """gradients(n): for each of n global batches of train, the gradients of its mean loss by weight, averaged over
    ranks. New batches on every call, from batch 0 on."""
    scan: Callable[[], Sensitivity] | None = None
    n_batches: int = 1
    """How many batches a method takes that does not choose itself."""
    fisher: FisherTask | None = None


@dataclass(frozen=True)
class Scored:
    """What a method returns."""

    scores: dict[str, Tensor]
    """The smallest are pruned first; finite."""
    counts: Callable[[float], dict[str, int]] | None = None
    """rate of all weights -> number of weights to prune in each layer; None: `prune.scope` decides."""
    compensate: Callable[[Tensors], dict[str, Tensor]] | None = None
    """masks (bool, False where pruned) -> new values of the encoder's parameters; those of pruned weights are not
    used."""
    learned: InverseFisher | None = None
    """For `FisherTask.learned` of the next round."""


@dataclass(frozen=True)
class PrunerSpec:
    """One pruning method: an entry of PRUNERS."""

    score: Callable[[PruneTask], Scored]
    needs: Literal["weights", "gradients", "scan", "fisher"] = "weights"


def score_weights(method: str, task: PruneTask) -> Scored:
    """The scores of a method of PRUNERS; weights that are zero already have the lowest: they count as pruned."""
    scored = PRUNERS[method].score(task)
    zeros_first = {
        name: score.masked_fill((task.weights[name].detach() == 0).to(score.device), torch.finfo(score.dtype).min)
        for name, score in scored.scores.items()
    }
    return replace(scored, scores=zeros_first)


def _l1(task: PruneTask) -> Scored:
    """The absolute value of each weight (Han et al. 2015; torch.nn.utils.prune's L1Unstructured)."""
    return Scored({name: weight.detach().abs() for name, weight in task.weights.items()})


def _taylor(task: PruneTask) -> Scored:
    """|w g|, the mean over batches: the first-order change of the loss without w (Molchanov et al. 2019,
    arXiv 1906.10771, equation 6, here without the square)."""
    assert task.gradients is not None
    totals = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in task.weights.items()}
    for gradients in task.gradients(task.n_batches):
        for name, gradient in gradients.items():
            totals[name] += (task.weights[name].detach() * gradient).abs()
    return Scored({name: total / task.n_batches for name, total in totals.items()})


def _random(task: PruneTask) -> Scored:
    """Uniform numbers, the same for the same seed: the control that every other method has to beat."""
    generator = torch.Generator().manual_seed(task.seed)
    return Scored({name: torch.rand(weight.shape, generator=generator) for name, weight in task.weights.items()})


def _l1_weighted(task: PruneTask) -> Scored:
    """|w| / ||W||_2, W being all weights of the layer: a layer of small weights is not pruned for its scale alone.

    In float64 on the CPU, where the order in which a norm is summed does not change the order of the weights.
    """
    magnitudes = {name: w.double().cpu() for name, w in _l1(task).scores.items()}
    return Scored({name: w / w.norm().clamp(min=torch.finfo(w.dtype).tiny) for name, w in magnitudes.items()})


def _lamp(task: PruneTask) -> Scored:
    """w^2 / the sum of v^2 over all v of the layer with |v| >= |w| (Lee et al. 2021, arXiv 2010.07611, equation 5).

    In float64 on the CPU: cumulative sums of a GPU are not reproducible. Of weights of equal absolute value the first
    has the smallest score. The largest of each layer has score 1: no layer loses all weights before every layer has
    one weight left.
    """
    return Scored({name: _lamp_scores(weight.detach()) for name, weight in task.weights.items()})


def _lamp_scores(weight: Tensor) -> Tensor:
    squares, order = weight.flatten().cpu().double().square().sort(stable=True)
    at_least = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = squares / at_least.clamp(min=torch.finfo(squares.dtype).tiny)
    return scores.view(weight.shape)


def _layer_sensitive(task: PruneTask) -> Scored:
    """|w|, with a rate for each layer: those whose predicted loss is the least (see `allocate_rates`)."""
    assert task.scan is not None
    return Scored(_l1(task).scores, counts=partial(allocate_rates, task.scan(), task.weights))


def _second_order(method: Callable[[Tensors, FisherTask, int], SecondOrder], task: PruneTask) -> Scored:
    assert task.fisher is not None
    found = method(task.weights, task.fisher, task.seed)
    return Scored(found.scores, compensate=found.compensate, learned=found.learned)


PRUNERS: dict[str, PrunerSpec] = {
    "l1": PrunerSpec(_l1),
    "random": PrunerSpec(_random),
    "l1_weighted": PrunerSpec(_l1_weighted),
    "lamp": PrunerSpec(_lamp),
    "layer_sensitive": PrunerSpec(_layer_sensitive, needs="scan"),
    "obs_diag": PrunerSpec(partial(_second_order, obs_diagonal), needs="fisher"),
    "obs_block": PrunerSpec(partial(_second_order, obs_blocks), needs="fisher"),
    "fishleg": PrunerSpec(partial(_second_order, fishleg), needs="fisher"),
}
"""`prune.method` -> its spec; not `channels`, which removes no single weights."""

CHANNEL_SCORES: dict[str, PrunerSpec] = {
    "l1": PrunerSpec(_l1),
    "taylor": PrunerSpec(_taylor, needs="gradients"),
}
"""`prune.channels.score` -> the spec of the scores of weights, of which a channel's are summed."""
