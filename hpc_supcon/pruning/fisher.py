"""The Fisher information of a model's parameters: products with vectors, and the gradients it is made of.

F = 1/n sum_i J_i^T M_i J_i for n rows of outputs z [n, k], J_i = d z_i / d parameters. What M_i is depends on `kind`:

    model       the Fisher information of the likelihood at z_i: the targets are those that the model itself expects
    sampled     e_i e_i^T with e_i = -d log p(y_i | z_i) / d z_i and y_i drawn from the model: the same in expectation
    empirical   e_i e_i^T with the targets of the batch: not the Fisher information, but what it is often replaced by
                (Kunstner et al. 2019, "Limitations of the empirical Fisher approximation")

The module runs as it is. In eval mode, BatchNorm normalizes by its running statistics, so that rows do not depend on
each other and F is that of the model with these statistics fixed; dropout is off.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..distributed.collectives import all_sum, rank, world_size
from ..errors import ConfigError, NonFinite, unknown_name
from ..seeding import stream

Tensors = dict[str, Tensor]
Outputs = Callable[[Mapping[str, Tensor], Any], Tensor]
"""outputs(parameters, inputs) -> z [n, k]: a pure function of the parameters."""

KINDS = ("model", "sampled", "empirical")
DERIVATIVES = ("forward", "differences")


class Likelihood(Protocol):
    """p(y | z) for rows z [n, k] of outputs."""

    def metric(self, z: Tensor, dz: Tensor) -> Tensor:
        """The Fisher information at z times dz, both [n, k]."""

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """One target for each row, drawn from p(y | z)."""

    def score(self, z: Tensor, targets: Tensor) -> Tensor:
        """-d log p(y | z) / d z, [n, k]."""


class Categorical:
    """Softmax over the k outputs of a row; targets are int64 [n], and a row whose target is negative counts as 0."""

    def metric(self, z: Tensor, dz: Tensor) -> Tensor:
        p = z.softmax(1)
        return p * (dz - (p * dz).sum(1, keepdim=True))

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        # by the inverse of the distribution function, from numbers drawn on the CPU: equal on every device
        draws = torch.rand(len(z), 1, generator=generator, dtype=torch.float64).to(z.device)
        return (z.double().softmax(1).cumsum(1) < draws).sum(1).clamp_(max=z.shape[1] - 1)

    def score(self, z: Tensor, targets: Tensor) -> Tensor:
        known = (targets >= 0)[:, None]
        one_hot = nn.functional.one_hot(targets.clamp(min=0), z.shape[1]).to(z.dtype)
        return (z.softmax(1) - one_hot) * known


@dataclass(frozen=True)
class Gaussian:
    """Independent normal targets [n, k] of mean z and one standard deviation."""

    sigma: float = 1.0

    def metric(self, z: Tensor, dz: Tensor) -> Tensor:
        return dz / self.sigma**2

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        draws = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        return z + self.sigma * draws.to(z.device, z.dtype)

    def score(self, z: Tensor, targets: Tensor) -> Tensor:
        return (z - targets) / self.sigma**2


def contrastive_outputs(features: Tensor, temperature: float) -> Tensor:
    """Outputs of a contrastive encoder, for `Categorical`: features [n, d] -> cosine similarities / temperature.

    The likelihood of a contrastive loss: for each row as the anchor, which other row of the batch is its positive, by
    a softmax over the similarities to all others. Returns [n, n - 1]; column j is row j, or j + 1 from the anchor on.
    It is a likelihood given the batch: F depends on the batch's size, and rows are not independent of each other.
    """
    unit = nn.functional.normalize(features, dim=1)
    n = len(unit)
    similarities = unit @ unit.T / temperature
    # the matrix without its diagonal: n - 1 runs of n values that follow each value of the diagonal
    return similarities.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def contrastive_targets(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Targets for the empirical Fisher of `contrastive_outputs`: a positive of each anchor, all equally likely.

    labels: int64 [n], equal for an anchor and its positives. Returns int64 [n], -1 for an anchor without positive.
    """
    n = len(labels)
    positive = labels[:, None] == labels
    positive = positive.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)
    draws = torch.rand(positive.shape, generator=generator).to(labels.device)
    target = draws.masked_fill(~positive, -1.0).argmax(1)
    return torch.where(positive.any(1), target, -1)


class ModelFisher:
    """Products with F, and gradients whose outer products have the mean F, on one batch at a time.

    A batch is a pair (inputs, targets), with targets None unless the kind is empirical. Tensors are given and
    returned by parameter name. The functions average over the rows of the batch, and know nothing of other ranks.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        outputs: Outputs,
        likelihood: Likelihood,
        *,
        kind: str = "model",
        derivative: str = "forward",
    ) -> None:
        """
        Args:
            parameters: those F is of, by name, at which it is evaluated; they are not changed.
            outputs: the model. For a module: `lambda p, x: functional_call(module, p, (x,))`.
            likelihood: of the targets given the outputs.
            kind: one of KINDS.
            derivative: how the outputs change along a vector. "forward": exactly, by forward-mode differentiation,
                in the pass that computes the outputs; "differences": from the outputs at two points, for models with
                an operation that has no forward mode.

        Raises ConfigError for an unknown kind or derivative.
        """
        for what, name, known in (("kind of Fisher", kind, KINDS), ("derivative", derivative, DERIVATIVES)):
            if name not in known:
                raise ConfigError(unknown_name(what, name, known))
        self.parameters = {name: p.detach() for name, p in parameters.items()}
        self._outputs, self._likelihood = outputs, likelihood
        self._kind, self._derivative = kind, derivative

    def product(self, batch: tuple[Any, Any], vectors: Mapping[str, Tensor], generator: torch.Generator) -> Tensors:
        """F v. The generator draws the targets of kind "sampled"."""
        leaves = {name: p.clone().requires_grad_() for name, p in self.parameters.items()}
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # its other kernels have no forward mode
            if self._derivative == "forward":
                z, dz = self._dual(leaves, vectors, batch[0])
            else:
                z, dz = self._outputs(leaves, batch[0]), self._difference(vectors, batch[0])
            return _gradients(z, self._metric(z.detach(), dz, batch[1], generator) / len(z), leaves)

    def gradients(self, batch: tuple[Any, Any], generator: torch.Generator) -> Tensors:
        """The gradient g of the mean negative log-likelihood, times sqrt(n): E[g g^T] = F for targets of the model.

        Targets are drawn from the model, or for kind "empirical" those of the batch; then the outer product has
        n times that of the mean gradient too, which vanishes where the model is trained.
        """
        leaves = {name: p.clone().requires_grad_() for name, p in self.parameters.items()}
        with torch.enable_grad():
            z = self._outputs(leaves, batch[0])
            return _gradients(z, self._scores(z.detach(), batch[1], generator) / len(z) ** 0.5, leaves)

    def sample_gradients(self, batch: tuple[Tensor, Any], generator: torch.Generator) -> Tensors:
        """The gradient of each sample's negative log-likelihood, [n, *shape]: the mean of their outer products is F.

        For outputs whose rows do not depend on each other, of which row i is that of inputs[i].
        """
        with torch.no_grad():
            z = self._outputs(self.parameters, batch[0])
            scores = self._scores(z, batch[1], generator)

        def along_scores(parameters: Tensors, inputs: Tensor, score: Tensor) -> Tensor:
            return (self._outputs(parameters, inputs[None])[0] * score).sum()

        with sdpa_kernel(SDPBackend.MATH):
            per_sample = torch.func.vmap(torch.func.grad(along_scores), (None, 0, 0))
            return per_sample(self.parameters, batch[0], scores)

    def _scores(self, z: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        own = targets if self._kind == "empirical" else self._likelihood.sample(z, generator)
        return self._likelihood.score(z, own)

    def _metric(self, z: Tensor, dz: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        if self._kind == "model":
            return self._likelihood.metric(z, dz)
        score = self._scores(z, targets, generator)
        return score * (score * dz).sum(1, keepdim=True)

    def _dual(self, leaves: Tensors, vectors: Mapping[str, Tensor], inputs: Any) -> tuple[Tensor, Tensor]:
        """(outputs with their graph, change of the outputs along the vectors)"""
        with warnings.catch_warnings():  # of what PyTorch imports when a tensor is first given a tangent
            warnings.simplefilter("ignore", FutureWarning)
            importlib.import_module("torch._decomp.decompositions_for_jvp")
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(leaf, vectors[name].detach()) for name, leaf in leaves.items()}
            z, dz = forward_ad.unpack_dual(self._outputs(duals, inputs))
        return z, torch.zeros_like(z) if dz is None else dz.detach()

    @torch.no_grad()
    def _difference(self, vectors: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """The change of the outputs along the vectors, from two points at equal distances (error of second order)."""
        length = _norm(vectors)
        if length == 0:
            return torch.zeros_like(self._outputs(self.parameters, inputs))
        # balances rounding, of relative size eps / h, against the error of order h^2
        step = torch.finfo(next(iter(vectors.values())).dtype).eps ** (1 / 3) * _norm(self.parameters) / length
        ahead, behind = (
            self._outputs({name: p.add(vectors[name], alpha=s) for name, p in self.parameters.items()}, inputs)
            for s in (float(step), -float(step))
        )
        return (ahead - behind) / (2 * step)


def mean_diagonal(fisher: ModelFisher, batches: Callable[[int], tuple[Any, Any]], count: int, seed: int) -> float:
    """The mean of F's diagonal over all its parameters, from gradients of `count` batches on each rank. Collective.

    A damping is chosen relative to it. Raises NonFinite.
    """
    total = torch.zeros((), dtype=torch.float64)
    for i in range(count):
        generator = torch.Generator().manual_seed(stream(seed, "inverse Fisher", 4, 0, i, rank()))
        total += float(_norm(fisher.gradients(batches(i), generator))) ** 2
    size = sum(p.numel() for p in fisher.parameters.values())
    mean = float(all_sum(total)) / (count * world_size() * size)
    if not math.isfinite(mean):
        raise NonFinite(
            f"pruning: the mean of the Fisher matrix's diagonal is {mean}: weights or images are not finite"
        )
    return mean


def mean_over_ranks(tensors: Tensors) -> Tensors:
    """The mean over ranks, in one message, with the same bits on all of them. Collective."""
    if world_size() == 1:
        return tensors
    message = all_sum(torch.cat([t.flatten() for t in tensors.values()])) / world_size()
    parts = message.split([t.numel() for t in tensors.values()])
    return {name: part.view(t.shape) for (name, t), part in zip(tensors.items(), parts, strict=True)}


def _norm(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([t.double().square().sum() for t in tensors.values()]).sum().sqrt()


def _gradients(z: Tensor, along: Tensor, leaves: Tensors) -> Tensors:
    """J^T along; zeros for a parameter that no output depends on."""
    found = torch.autograd.grad(z, list(leaves.values()), along, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
