"""Structured pruning: which output channels of convolutions are removed, and the tensors of the smaller model.

    graph = trace_channels(encoder, example)
    plan = channel_plan(graph, scores, rate, scope)
    description["encoder"]["channels"] = layer_widths(encoder.state_dict(), plan)
    smaller = build_encoder(**description["encoder"])
    smaller.load_state_dict(apply_plan(encoder.state_dict(), plan))

A plan is plain data: name in the state dict -> for each dimension the entries that are kept, or None for all.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import ConfigError, NonFinite, PruningError, unknown_name
from .channel_graph import ChannelGraph
from .selection import SCOPES

Plan = dict[str, list[list[int] | None]]
TOLERANCE = 1e-5
"""Largest allowed difference of the smaller model from the masked one in float64, relative to the largest output if
that is above 1."""


def channel_scores(graph: ChannelGraph, scores: Mapping[str, Tensor], *, relative: bool) -> Tensor:
    """float64 [units]: the score of each removable unit, the sum over the filters that are removed with it.

    scores: of single weights, by the weight's name: |w| for the L1 norm of filters (Li et al. 2017, arXiv 1608.08710,
    section 3.1), |w g| for the first-order Taylor expansion of the loss (Molchanov et al. 2019, arXiv 1906.10771,
    section 3.1, here without the square). relative: divide the filters' scores by the mean of their layer, and take
    the mean over the unit's filters: for scores whose scale differs between layers, as that of L1 norms does.
    """
    total = torch.zeros(graph.units + 1, dtype=torch.float64)
    count = torch.zeros(graph.units + 1, dtype=torch.float64)
    for name in graph.outputs:
        filters = scores[name].detach().cpu().double().flatten(1).sum(1)
        if not torch.isfinite(filters).all():
            raise NonFinite(f"pruning: scores of {name} are NaN or Inf")
        if relative:
            filters = filters / filters.mean().clamp(min=torch.finfo(torch.float64).tiny)
        units = graph.axes[name, 0]
        total.index_add_(0, units, filters)
        count.index_add_(0, units, torch.ones_like(filters))
    return (total / count.clamp(min=1) if relative else total)[1:]


def channel_plan(graph: ChannelGraph, scores: Tensor, rate: float, scope: str) -> Plan:
    """What is kept when the round(rate x n) units with the smallest scores are removed.

    scores: [units], see `channel_scores`. scope "global": all units are ranked together; "layer": those of the
    convolutions whose channels are added to each other or shared, by themselves; n is the number of units ranked
    together. Of every convolution the channel with the largest score is kept. Of equal scores the first are removed.
    Raises ConfigError.
    """
    if scope not in SCOPES:
        raise ConfigError("prune.scope: " + unknown_name("scope", scope, SCOPES))
    if not 0 <= rate < 1:
        raise ConfigError(f"prune.rate={rate:g}: the fraction of channels to remove must be at least 0 and below 1")
    removed = torch.zeros(graph.units + 1, dtype=torch.bool)
    ranked = torch.cat([torch.zeros(1, dtype=scores.dtype), scores])
    best = _best(graph, ranked)
    for members in [torch.arange(1, graph.units + 1)] if scope == "global" else _layers(graph):
        ascending = members[ranked[members].argsort(stable=True)]
        candidates = ascending[~torch.isin(ascending, best)]
        removed[candidates[: round(rate * len(members))]] = True
    plan: Plan = {}
    for (name, dim), units in graph.axes.items():
        keep = (~removed[units]).nonzero().flatten().tolist()
        if len(keep) < len(units):
            dims = plan.setdefault(name, [None, None])
            dims[dim] = keep
    return plan


def _best(graph: ChannelGraph, ranked: Tensor) -> Tensor:
    """Of each convolution the removable unit of the largest score, unless it has channels that are kept anyway."""
    best = []
    for name in graph.outputs:
        units = graph.axes[name, 0]
        if bool((units > 0).all()):
            best.append(units[ranked[units].argmax()])
    return torch.stack(best) if best else torch.empty(0, dtype=torch.int64)


def _layers(graph: ChannelGraph) -> list[Tensor]:
    """The units in the smallest sets that no convolution's output channels divide, in order of their first unit."""
    layer = torch.arange(graph.units + 1)
    while True:
        before = layer.clone()
        for name in graph.outputs:
            units = graph.axes[name, 0]
            units = units[units > 0]
            layer[torch.isin(layer, layer[units])] = layer[units].min()
        if torch.equal(layer, before):
            break
    return [(layer == first).nonzero().flatten() for first in layer[1:].unique()]


def apply_plan(state: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The state dict of the smaller model: of each tensor in the plan, the entries that are kept."""
    smaller = {}
    for name, tensor in state.items():
        for dim, keep in enumerate(plan.get(name, ())):
            if keep is not None:
                tensor = tensor.index_select(dim, torch.tensor(keep, device=tensor.device))
        smaller[name] = tensor.detach().clone()
    return smaller


@torch.no_grad()
def mask_channels(module: nn.Module, plan: Plan) -> None:
    """Set the parameters of removed channels to zero, in place: filters, biases, BatchNorm's weights and biases."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, dims in plan.items():
        for dim, keep in enumerate(dims):
            if keep is not None and name in parameters:
                kept = torch.zeros(parameters[name].shape[dim], dtype=torch.bool)
                kept[keep] = True
                parameters[name].index_fill_(dim, (~kept).nonzero().flatten().to(parameters[name].device), 0.0)


def layer_widths(state: Mapping[str, Tensor], plan: Plan) -> dict[str, list[int]]:
    """Layer -> its sizes in the smaller model: the argument `channels` of `models.build_encoder`, plain data."""
    widths = {}
    for name, dims in plan.items():
        layer, _, own = name.rpartition(".")
        if own == "weight":
            shape = state[name].shape[:2]
            widths[layer] = [n if keep is None else len(keep) for n, keep in zip(shape, dims, strict=False)]
    return widths


@torch.no_grad()
def check_plan(encoder: nn.Module, smaller: nn.Module, plan: Plan, example: Tensor) -> float:
    """The largest difference of the smaller model's outputs from those of `encoder` with `mask_channels`, in float64,
    for random inputs of the shape of `example`. Raises PruningError above TOLERANCE."""
    masked = copy.deepcopy(encoder).double().cpu().eval()
    mask_channels(masked, plan)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(example.shape, generator=generator, dtype=torch.float64)
    expected = masked(images)
    try:
        actual = copy.deepcopy(smaller).double().cpu().eval()(images)
    except (RuntimeError, ValueError) as error:
        raise PruningError(
            f"prune.method=channels: {type(encoder).__name__} cannot be computed with fewer channels: {error}"
        ) from error
    difference = float((actual - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):  # NaN fails as well
        raise PruningError(
            f"prune.method=channels: the outputs of the smaller {type(encoder).__name__} differ from those of the "
            f"masked one by {difference:.2g}: nothing was written"
        )
    return difference


def plan_digest(plan: Plan) -> str:
    """sha256: equal for equal plans."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
