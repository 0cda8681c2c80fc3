"""The FishLeg surgeon: an inverse Fisher matrix that is learned, for pruning.

McGowan et al. 2024, "Efficient Model Compression Techniques with FishLeg" (arXiv 2412.02328), after Garcia et al.
2023, "Fisher-Legendre (FishLeg) optimization of deep neural networks" (ICLR).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.collectives import rank, world_size
from ..errors import ConfigError, NonFinite, unknown_name
from ..seeding import stream
from . import kronecker
from .fisher import ModelFisher, Tensors, mean_over_ranks
from .kronecker import Form
from .obs import finite, solve_removed

BETAS = (0.9, 0.99)
"""Of Adam. The second moment is short: at first, gradients are larger by orders of magnitude."""
DIRECTIONS = ("random", "fisher")


class InverseFisher:
    """Q, an estimate of (F + damping I)^-1 that is learned from products of F with vectors; F is never formed.

    For each layer, with U its weight and bias as a matrix, Q u = A o (R^T R (A o U) L L^T): A has one value for each
    weight, L and R are square. Parameters of other layers (norms, embeddings) have A alone, and no entry of Q links
    two layers. Q is symmetric and never indefinite, whatever A, L and R are.

    What is minimized is FishLeg's auxiliary loss, 1/2 v^T (F + damping I) v - u^T v with v = Q u, over random vectors
    u. Its minimum over all matrices Q is the inverse. Memory is linear in the number of weights but for L and R: see
    `largest_factor`.

    Tensors are given and returned by parameter name. For masks, a parameter without one keeps all its weights.
    """

    def __init__(
        self, module: nn.Module, *, damping: float, names: Iterable[str] | None = None, largest_factor: int = 1024
    ) -> None:
        """
        Args:
            module: whose parameters F is of; only their shapes, dtype and device are read. Q = I / damping at first.
            damping: > 0, in the units of F.
            names: only these parameters; by default, all.
            largest_factor: side of the largest block of L and R. A layer with more inputs (times kernel) or outputs
                has block-diagonal factors.
        """
        parameters = dict(module.named_parameters())
        self.damping = damping
        self._forms = kronecker.forms(module, names)
        self._learned: Tensors = {}
        self._keep: Tensors = {}
        for form in self._forms:
            u = form.pack({name: parameters[name].detach() for name in form.names})
            # A by its logarithm, so that a step changes it by a factor
            self._learned[f"A/{form.key}"] = torch.full_like(u, -0.5 * math.log(damping))
            self._keep[form.key] = torch.ones_like(u, dtype=torch.bool)
            if form.is_matrix:
                self._learned[f"L/{form.key}"] = kronecker.identity(form.groups, u.shape[2], largest_factor, u)
                self._learned[f"R/{form.key}"] = kronecker.identity(form.groups, u.shape[1], largest_factor, u)
        self._start(0)

    def _start(self, fit: int) -> None:
        self._fit, self._step = fit, 0
        self._moments = [{key: torch.zeros_like(t) for key, t in self._learned.items()} for _ in BETAS]

    def fit(
        self,
        fisher: ModelFisher,
        batches: Callable[[int], tuple[Any, Any]],
        steps: int,
        *,
        seed: int,
        lr: float = 0.03,
        warmup: int = 32,
        directions: str = "fisher",
        preconditioned: bool = True,
        after_step: Callable[[int, float], None] | None = None,
    ) -> list[float]:
        """Learn until `steps` steps are done; after `load_state_dict` an interrupted fit goes on. Collective.

        When it is done, another call does nothing until `exclude` or `refine` begins the next fit.

        Args:
            fisher: of the same parameters.
            batches: index -> batch, a pure function. The first fit's warm-up and then each step takes the next index,
                or two with directions "fisher". Ranks have batches of their own, of equal sizes.
            steps: of Adam, with a learning rate that falls linearly to 0.
            seed: of the random vectors and targets.
            lr: about the relative change of Q in one step.
            warmup: number of batches whose gradients give the start of the first fit: A from g^2 + damping, L and R
                from the correlations of a layer's inputs and outputs in F + damping I. 0: the start is 1 / damping.
            directions: of u: "fisher", gradients plus noise of the variance `damping`, whose covariance is
                F + damping I, or "random", of independent normal entries. Weights whose gradients are small are
                learned with both.
            preconditioned: L and R are learned in coordinates in which each is the identity, so that the size of a
                step does not depend on the curvature that they have taken up.
            after_step: called with (steps done, loss).

        Returns the losses of the steps taken. Raises ConfigError for unknown directions, and NonFinite.
        """
        if directions not in DIRECTIONS:
            raise ConfigError(unknown_name("directions", directions, DIRECTIONS))
        warmup = 0 if self._fit else warmup
        if warmup and not self._step:
            self._warm_up(fisher, batches, warmup, seed)
        used, losses = 2 if directions == "fisher" else 1, []
        while self._step < steps:
            index = warmup + used * self._step
            u = self._random(self._generator(seed, 0, self._step))
            if directions == "fisher":
                g = fisher.gradients(batches(index + 1), self._generator(seed, 1, self._step, rank()))
                # a mean over ranks, but sqrt of the number of rows that it is of
                g = {name: world_size() ** 0.5 * t for name, t in mean_over_ranks(g).items()}
                u = self._masked({name: g[name] + self.damping**0.5 * t for name, t in u.items()})
            loss, gradients = self._loss(fisher, batches(index), u, self._generator(seed, 2, self._step, rank()))
            self._adam(gradients, lr * (1 - self._step / steps), preconditioned)
            self._step += 1
            losses.append(loss)
            if after_step:
                after_step(self._step, loss)
        return losses

    def refine(self) -> None:
        """Begin a new fit from the present Q: the weights or the damping have changed."""
        self._start(self._fit + 1)

    def exclude(self, keep: Mapping[str, Tensor]) -> None:
        """Take pruned weights (False in `keep`) out of Q, whose rows and columns become 0, and begin a new fit.

        What is learned next is the inverse of the Fisher matrix of the weights that are left. Before the first fit,
        that one has its warm-up.
        """
        self._keep = {form.key: self._keep[form.key] & self._packed_mask(form, keep) for form in self._forms}
        if self._fit or self._step:
            self.refine()

    def product(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Q u."""
        return self._mapped(lambda form: self._times_q(form, form.pack(tensors)))

    def diagonal(self) -> Tensors:
        """The diagonal of Q; 0 for excluded weights."""
        return self._mapped(lambda form: kronecker.diagonal(*self._factors(form)).detach())

    @torch.no_grad()
    def compensate(
        self, weights: Mapping[str, Tensor], keep: Mapping[str, Tensor], *, joint: bool = True, iterations: int = 200
    ) -> Tensors:
        """The weights after removal of those that are False in `keep`: 0 there, and the others changed to compensate.

        With E the removed weights, w - Q E (E^T Q E)^-1 E^T w: of all changes that set E to 0, the one of the
        smallest 1/2 dw^T Q^-1 dw (Hassibi and Stork 1992, for a set). The system is solved layer by layer in at most
        `iterations` of conjugate gradients. joint=False: the sum of the changes for each weight alone,
        w_q / Q_qq Q e_q, as in the paper; it takes no account of correlations within the removed set.
        """

        def changed(form: Form) -> Tensor:
            w, left = form.pack(weights), self._packed_mask(form, keep)
            removed = ~left & self._keep[form.key]
            q = kronecker.diagonal(*self._factors(form))
            x = torch.where(removed, w / q, 0)
            if joint and removed.any():
                x = solve_removed(
                    lambda u: self._times_q(form, u), torch.where(removed, w, 0), removed, q, iterations
                )
            return torch.where(left & self._keep[form.key], w - self._times_q(form, x), torch.where(left, w, 0))

        return finite(self._mapped(changed), "compensated weights")

    @property
    def steps(self) -> int:
        """Steps that are done of the present fit."""
        return self._step

    def memory(self) -> int:
        """Bytes of A, L, R, the masks and Adam's moments."""
        tensors = [*self._learned.values(), *self._keep.values(), *(t for m in self._moments for t in m.values())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def state_dict(self) -> Tensors:
        """Copies of all tensors, with an entry `progress` [fit, step]."""
        state = {f"Q/{key}": t.clone() for key, t in self._learned.items()}
        state |= {f"keep/{key}": t.clone() for key, t in self._keep.items()}
        for i, moments in enumerate(self._moments):
            state |= {f"moment{i}/{key}": t.clone() for key, t in moments.items()}
        return state | {"progress": torch.tensor([self._fit, self._step])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises KeyError for a missing tensor, RuntimeError for one of another shape."""
        moments = [(f"moment{i}", own) for i, own in enumerate(self._moments)]
        for prefix, own in (("Q", self._learned), ("keep", self._keep), *moments):
            for key, t in own.items():
                t.copy_(state[f"{prefix}/{key}"])
        self._fit, self._step = (int(i) for i in state["progress"])

    def _warm_up(self, fisher: ModelFisher, batches: Callable[[int], Any], count: int, seed: int) -> None:
        """Start from Q^-1 = A^-1 (S o T) A^-1 with the diagonal of F + damping I, S and T correlations in it.

        S and T are those of its partial traces, over a layer's outputs and over its inputs: if F + damping I is a
        Kronecker product, it is the one of S and T.
        """
        sums = {key: torch.zeros_like(t) for key, t in self._learned.items()}
        for i in range(count):
            g = fisher.gradients(batches(i), self._generator(seed, 3, i, rank()))
            for form in self._forms:
                u = form.pack(g) * self._keep[form.key]
                sums[f"A/{form.key}"] += u.square()
                if form.is_matrix:
                    for key, x in ((f"L/{form.key}", u), (f"R/{form.key}", u.mT)):
                        sums[key] += kronecker.outer_products(x, self._learned[key])
        means = finite({key: t / count for key, t in mean_over_ranks(sums).items()}, "squared gradients")
        for form in self._forms:
            a = means[f"A/{form.key}"]
            self._learned[f"A/{form.key}"] = -0.5 * (a + self.damping).log()
            if form.is_matrix:
                for key, over in ((f"L/{form.key}", a.shape[1]), (f"R/{form.key}", a.shape[2])):
                    # the factor is still the identity
                    found = kronecker.whitener(means[key] + over * self.damping * self._learned[key])
                    self._learned[key] = found if key[0] == "L" else found.mT.contiguous()

    def _loss(
        self, fisher: ModelFisher, batch: tuple[Any, Any], u: Tensors, generator: torch.Generator
    ) -> tuple[float, Tensors]:
        """The auxiliary loss for one u, and its gradients."""
        for t in self._learned.values():
            t.requires_grad_()
        with torch.enable_grad():
            v = self.product(u)
            fixed = {name: t.detach() for name, t in v.items()}
            product = self._masked(mean_over_ranks(fisher.product(batch, fixed, generator)))
            # d loss / d v, which is all that is needed of the quadratic form
            residual = {name: t + self.damping * fixed[name] - u[name] for name, t in product.items()}
            along = torch.stack([(t * residual[name]).sum() for name, t in v.items()]).sum()
            gradients = torch.autograd.grad(along, list(self._learned.values()))
        for t in self._learned.values():
            t.requires_grad_(False)
        loss = sum(float((t * (residual[name] - u[name])).sum()) for name, t in fixed.items()) / 2
        if not math.isfinite(loss):
            raise NonFinite(f"pruning: the loss of the inverse Fisher is {loss} at step {self._step + 1}: lower its "
                            "learning rate or raise the damping")  # fmt: skip
        return loss, dict(zip(self._learned, gradients, strict=True))

    def _adam(self, gradients: Tensors, lr: float, preconditioned: bool) -> None:
        """Not torch.optim's: a step of L is L <- L (I + E), one of R is R <- (I + E) R, and the moments are of E."""
        first, second = self._moments
        for key, t in self._learned.items():
            g, kind = gradients[key], key[0]
            if preconditioned and kind != "A":
                g = t.mT @ g if kind == "L" else g @ t.mT
            first[key].lerp_(g, 1 - BETAS[0])
            second[key].lerp_(g.square(), 1 - BETAS[1])
            mean, square = (m[key] / (1 - b ** (self._step + 1)) for m, b in zip(self._moments, BETAS, strict=True))
            e = torch.where(square > 0, mean / square.sqrt(), 0)
            # of a matrix of random signs of size n the norm is about sqrt(n), so that E has a norm of about lr
            e *= -lr if kind == "A" else -lr / math.sqrt(t.shape[-1])
            if preconditioned and kind != "A":
                e = t @ e if kind == "L" else e @ t
            t += e

    def _factors(self, form: Form) -> tuple[Tensor, Tensor | None, Tensor | None]:
        a = self._learned[f"A/{form.key}"].exp() * self._keep[form.key]
        return a, self._learned.get(f"L/{form.key}"), self._learned.get(f"R/{form.key}")

    def _times_q(self, form: Form, u: Tensor) -> Tensor:
        factors = self._factors(form)
        return kronecker.half_transposed(kronecker.half(u, *factors), *factors)

    def _mapped(self, function: Callable[[Form], Tensor]) -> Tensors:
        return {name: t for form in self._forms for name, t in form.unpack(function(form))}

    def _masked(self, tensors: Tensors) -> Tensors:
        return self._mapped(lambda form: form.pack(tensors) * self._keep[form.key])

    def _packed_mask(self, form: Form, keep: Mapping[str, Tensor]) -> Tensor:
        """keep [groups, rows, columns] of one layer, True for parameters without a mask."""
        own = self._keep[form.key]
        ones = zip(form.names, form.shapes, strict=True)
        every = {name: torch.ones(shape, dtype=torch.bool, device=own.device) for name, shape in ones}
        return form.pack(every | {name: keep[name].to(own.device) for name in form.names if name in keep})

    def _random(self, generator: torch.Generator) -> Tensors:
        """Independent normal values, 0 for excluded weights; drawn on the CPU, so that every device has the same."""

        def drawn(form: Form) -> Tensor:
            keep, a = self._keep[form.key], self._learned[f"A/{form.key}"]
            return torch.randn(a.shape, generator=generator, dtype=torch.float32).to(a) * keep

        return self._mapped(drawn)

    def _generator(self, seed: int, purpose: int, *indices: int) -> torch.Generator:
        return torch.Generator().manual_seed(stream(seed, "inverse Fisher", purpose, self._fit, *indices))
