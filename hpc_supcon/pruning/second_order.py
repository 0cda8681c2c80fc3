"""Second-order pruning methods: scores and compensated weights from an inverse Fisher matrix of the encoder.

obs_diag     the diagonal of F alone: w^2 (F_ii + damping) / 2, nothing is compensated (optimal brain damage)
obs_block    F in blocks of weights of one output
fishleg      an inverse of F that is learned, for each layer with Kronecker factors
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..distributed.collectives import rank, world_size
from ..errors import NonFinite
from ..seeding import stream
from .fisher import Likelihood, ModelFisher, Outputs, Tensors, mean_diagonal
from .fishleg import InverseFisher
from .obs import BlockFisher, removal_scores

DAMPING_BATCHES = 32
BLOCK_DAMPING = 0.01
"""Damping of blocks relative to the mean of F's diagonal, where none is given; that of other methods is 1."""
SAVE_EVERY = 20
"""Steps from one save of a matrix that is learned to the next."""
CHUNK = 2**27
"""Values of single gradients that are held at a time."""

Compensate = Callable[[Mapping[str, Tensor]], Tensors]


@dataclass(frozen=True)
class FisherSettings:
    """See section `prune.fisher` of the configuration."""

    kind: str = "model"
    damping: float | None = None
    steps: int = 100
    lr: float = 0.03
    largest_factor: int = 1024
    joint: bool = True
    samples: int = 2048
    batches: int = 256
    block: int = 64


class Kept(Protocol):
    """Where a matrix is kept while it is learned, so that an interrupted estimate goes on."""

    def load(self) -> Tensors | None:
        """What was saved last, the same on all ranks. Collective."""

    def save(self, step: int, state: Tensors) -> None:
        """Called on all ranks, with the same tensors."""


@dataclass(frozen=True)
class FisherTask:
    """What a second-order method is told about the model besides the weights to prune. Collective."""

    encoder: nn.Module
    """In eval mode; F is of its parameters."""
    outputs: Outputs
    """outputs(parameters, inputs) -> z [n, k]: those that are not given are the encoder's own."""
    likelihood: Likelihood
    batches: Callable[[int], tuple[Tensor, Tensor]]
    """batches(i) -> inputs and targets [n] of this rank's share of the i-th global batch; a pure function."""
    independent: bool
    """Whether row i of the outputs depends on inputs[i] alone."""
    settings: FisherSettings = FisherSettings()
    learned: InverseFisher | None = None
    """Of a round of pruning before, from which fishleg goes on."""
    kept: Kept | None = None
    tell: Callable[[str], None] = lambda line: None
    """Shows the user one line."""


@dataclass(frozen=True)
class SecondOrder:
    """What a method finds."""

    scores: Tensors
    compensate: Compensate
    learned: InverseFisher | None = None


def obs_diagonal(weights: Mapping[str, Tensor], task: FisherTask, seed: int) -> SecondOrder:
    """Scores from the diagonal of F + damping; the other weights stay as they are. Raises NonFinite."""
    return _obs(weights, task, seed, 1, 1.0)


def obs_blocks(weights: Mapping[str, Tensor], task: FisherTask, seed: int) -> SecondOrder:
    """Scores and compensation from blocks of `settings.block` weights of one output. Raises NonFinite."""
    return _obs(weights, task, seed, task.settings.block, BLOCK_DAMPING)


def _obs(weights: Mapping[str, Tensor], task: FisherTask, seed: int, block: int, relative: float) -> SecondOrder:
    own = {name: w.detach() for name, w in weights.items()}
    fisher = ModelFisher(own, task.outputs, task.likelihood, kind=task.settings.kind)
    damping = _damping(fisher, task, seed, relative)
    blocks = BlockFisher(own, block)
    task.tell(f"Fisher matrix in blocks of {block}: {blocks.memory() / 1e6:,.1f} MB, damping {damping:.3g}")
    for gradients in _single_gradients(fisher, task, seed):
        blocks.add(gradients)
    inverse = blocks.inverse(damping, _left(own))
    return SecondOrder(removal_scores(own, inverse.diagonal()), lambda keep: inverse.compensate(own, keep))


def _single_gradients(fisher: ModelFisher, task: FisherTask, seed: int) -> Iterator[Tensors]:
    """Gradients [m, *shape] of this rank's share of `settings.samples` rows, else of `settings.batches` batches."""
    settings, ranks, index, done = task.settings, world_size(), 0, 0
    wanted = -(-(settings.samples if task.independent else settings.batches) // ranks)
    values = sum(p.numel() for p in fisher.parameters.values())
    while done < wanted:
        inputs, targets = task.batches(index)
        generator = _generator(seed, 6, index, rank())
        if task.independent:
            inputs, targets = inputs[: wanted - done], targets[: wanted - done]
            size = max(1, CHUNK // values)
            for batch in zip(inputs.split(size), targets.split(size), strict=True):
                yield fisher.sample_gradients(batch, generator)
            done += len(inputs)
        else:
            yield {name: g[None] for name, g in fisher.gradients((inputs, targets), generator).items()}
            done += 1
        index += 1


def fishleg(weights: Mapping[str, Tensor], task: FisherTask, seed: int) -> SecondOrder:
    """Scores and compensation from an inverse that is learned in `settings.steps` steps; biases are changed as well.

    After a round of pruning, the inverse of that round is the start, without what it removed, and is learned in half
    as many steps at the new weights. Raises NonFinite.
    """
    parameters = {name: p.detach() for name, p in task.encoder.named_parameters()}
    own = {name: w.detach() for name, w in weights.items()}
    fisher, settings, inverse = _with_products(parameters, task), task.settings, task.learned
    saved = None if task.kept is None else task.kept.load()
    if inverse is None:
        damping = float(saved["damping"]) if saved else _damping(fisher, task, seed, 1.0)
        inverse = InverseFisher(task.encoder, damping=damping, largest_factor=settings.largest_factor)
        steps = settings.steps
    else:
        steps = (settings.steps + 1) // 2
    inverse.exclude(_left(own))
    if saved:
        inverse.load_state_dict(saved)
    damping = inverse.damping
    task.tell(
        f"inverse Fisher matrix: {inverse.memory() / 1e6:,.1f} MB, damping {damping:.3g}, "
        f"{inverse.steps} of {steps} steps done"
    )

    def save(step: int, loss: float) -> None:
        if task.kept is not None and (step % SAVE_EVERY == 0 or step == steps):
            state = inverse.state_dict() | {"damping": torch.tensor(damping, dtype=torch.float64)}
            task.kept.save(step, state)

    inverse.fit(fisher, task.batches, steps, seed=seed, lr=settings.lr, after_step=save)
    scores = removal_scores(own, inverse.diagonal())
    learned = inverse

    def compensate(keep: Mapping[str, Tensor]) -> Tensors:
        return learned.compensate(parameters, keep, joint=settings.joint)

    return SecondOrder(scores, compensate, inverse)


def _with_products(parameters: Tensors, task: FisherTask) -> ModelFisher:
    """F, whose products are by forward differentiation where every operation of the model has it.

    All ranks have the same model, so that they decide the same.
    """
    arguments: tuple[Any, ...] = (parameters, task.outputs, task.likelihood)
    fisher = ModelFisher(*arguments, kind=task.settings.kind)
    inputs, targets = task.batches(0)
    try:
        fisher.product((inputs[:2], targets[:2]), fisher.parameters, torch.Generator())
    except NotImplementedError:
        task.tell("the Fisher matrix is measured by differences: an operation of the model has no forward derivative")
        return ModelFisher(*arguments, kind=task.settings.kind, derivative="differences")
    return fisher


def _damping(fisher: ModelFisher, task: FisherTask, seed: int, relative: float) -> float:
    """`settings.damping`, or relative to the mean of F's diagonal. Collective."""
    if task.settings.damping is not None:
        return task.settings.damping
    mean = mean_diagonal(fisher, task.batches, DAMPING_BATCHES, seed)
    if mean <= 0:
        raise NonFinite("pruning: the Fisher matrix is 0: the outputs do not depend on the weights; set its damping")
    return relative * mean


def _left(weights: Mapping[str, Tensor]) -> Tensors:
    """Masks of the weights that are not pruned already."""
    return {name: w != 0 for name, w in weights.items()}


def _generator(seed: int, purpose: int, *indices: int) -> torch.Generator:
    return torch.Generator().manual_seed(stream(seed, "inverse Fisher", purpose, *indices))
