"""LARS and LAMB: optimizers that scale each weight's step to the weight's norm.

All operations are on lists of tensors (torch._foreach_*), and conditions on norms are evaluated on the device, so
that a step never makes the host wait. Each weight's own factor is the 0-dim first operand of `_foreach_addcmul_`, for
which CUDA has a multi-tensor kernel; `_foreach_mul_` by a list of 0-dim tensors would be one launch for each weight.

Parameter groups take `lr`, `weight_decay` and `adapt` (False: no trust ratio, as in SGD and Adam).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Any]
Groups = list[dict[str, Any]]
TensorList = tuple[Tensor, ...] | list[Tensor]


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose steps are scaled to the weights' norms (You et al. 2017, algorithm 1).

    For each weight w with gradient g, u = g + weight_decay w:
        ratio = eta |w| / (|g| + weight_decay |w| + eps), 1 where |w| or |g| is 0
        v = momentum v + ratio u,   w = w - lr v   (Nesterov: w - lr (ratio u + momentum v))
    Unlike in the paper, the learning rate is outside the momentum, as in PyTorch's SGD: a schedule acts at once.
    clip: ratio / lr, at most 1, in place of ratio: a weight's own learning rate is then the smaller of `lr` and
    ratio (LARC, the variant of solo-learn and NVIDIA Apex).
    """

    def __init__(
        self,
        groups: Groups,
        *,
        lr: float = 1e-3,
        momentum: float = 0.9,
        nesterov: bool = False,
        eta: float = 0.001,
        eps: float = 0.0,
        clip: bool = False,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "adapt": True})
        self.momentum, self.nesterov, self.eta, self.eps, self.clip = momentum, nesterov, eta, eps, clip

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Update all parameters that have a gradient.

        closure: computes the loss and its gradients; it is called first, and its loss is returned. Without it: None.
        """
        loss = _evaluate(closure)
        for group in self.param_groups:
            params, grads = _with_gradient(group)
            if not params:
                continue
            decay = group["weight_decay"]
            updates = torch._foreach_add(grads, params, alpha=decay) if decay else grads
            if not group["adapt"]:
                self._move(params, updates, None, group["lr"])
                continue
            w, g = _norms(params, grads)
            ratio = self.eta * w / (g + decay * w + self.eps)
            if self.clip and group["lr"] > 0:
                ratio = (ratio / group["lr"]).clamp(max=1.0)
            ratio = torch.where((w > 0) & (g > 0), ratio, 1.0)
            self._move(params, updates, ratio.unbind(), group["lr"])
        return loss

    def _move(self, params: list[Tensor], updates: TensorList, ratio: TensorList | None, lr: float) -> None:
        """One step of SGD with momentum along ratio x updates."""
        if self.momentum == 0:
            _add_scaled(params, ratio, updates, -lr)
            return
        buffers = _slots(self.state, params, "momentum_buffer")
        torch._foreach_mul_(buffers, self.momentum)
        _add_scaled(buffers, ratio, updates, 1.0)
        if self.nesterov:
            _add_scaled(params, ratio, updates, -lr)
        torch._foreach_add_(params, buffers, alpha=-lr * (self.momentum if self.nesterov else 1.0))


class Lamb(torch.optim.Optimizer):
    """Adam whose steps are scaled to the weights' norms (You et al. 2020, algorithm 2).

    For each weight w with gradient g, in its t-th step:
        m = beta1 m + (1 - beta1) g,   s = beta2 s + (1 - beta2) g^2
        u = m / (1 - beta1^t) / (sqrt(s / (1 - beta2^t)) + eps) + weight_decay w
        w = w - lr (phi(|w|) / |u|) u,   the ratio being 1 where phi(|w|) or |u| is 0
    phi clamps to `norm_range`, as in the paper; None: the norm itself.
    """

    def __init__(
        self,
        groups: Groups,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        norm_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "adapt": True})
        self.betas, self.eps, self.norm_range = betas, eps, norm_range

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Update all parameters that have a gradient; for `closure` see Lars.step."""
        loss = _evaluate(closure)
        members = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        counts = self._count([p for _, p in members])
        for t in sorted(set(counts)):  # one, unless a parameter got its first gradient later than others
            self._update([member for member, count in zip(members, counts, strict=True) if count == t], t)
        return loss

    def _update(self, members: list[tuple[dict[str, Any], Tensor]], t: int) -> None:
        """The t-th step of these (group, parameter), of all groups at once as far as they are treated alike."""
        # both bias corrections enter as numbers, not as passes over the tensors: u is `scale` times `updates`
        root = (1 - self.betas[1] ** t) ** 0.5
        scale = root / (1 - self.betas[0] ** t)
        moves = iter(self._adam_directions([p for _, p in members], self.eps * root))
        for group in self.param_groups:
            params = [p for owner, p in members if owner is group]
            updates = [next(moves) for _ in params]
            if not params:
                continue
            if group["weight_decay"]:
                torch._foreach_add_(updates, params, alpha=group["weight_decay"] / scale)
            ratio = self._trust_ratios(params, updates, scale) if group["adapt"] else None
            _add_scaled(params, ratio, updates, -group["lr"] * scale)

    def _adam_directions(self, params: list[Tensor], eps: float) -> TensorList:
        """Update m and s; returns m / (sqrt(s) + eps)."""
        beta1, beta2 = self.betas
        grads = [p.grad for p in params if p.grad is not None]
        mean, square = _slots(self.state, params, "exp_avg"), _slots(self.state, params, "exp_avg_sq")
        torch._foreach_lerp_(mean, grads, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(square)
        torch._foreach_add_(denominator, eps)
        return torch._foreach_div(mean, denominator)

    def _count(self, params: list[Tensor]) -> list[int]:
        """Number of steps of each parameter, including this one. Kept on the CPU, to be read without waiting."""
        for p in params:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), device="cpu")
        if not params:
            return []
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_add_(steps, 1.0)
        return [int(t) for t in torch.stack(steps).tolist()]

    def _trust_ratios(self, params: list[Tensor], updates: list[Tensor], scale: float) -> TensorList:
        w, u = _norms(params, updates)
        u = u * scale
        if self.norm_range is not None:
            w = w.clamp(*self.norm_range)
        return torch.where((w > 0) & (u > 0), w / u, 1.0).unbind()


def _evaluate(closure: Closure | None) -> Any:
    """The loss of a closure, called with gradients enabled, as PyTorch's own optimizers call it."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _with_gradient(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    params = [p for p in group["params"] if p.grad is not None]
    return params, [p.grad for p in params]


def _norms(a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Euclidean norms of n and n tensors: two vectors [n]."""
    first, second = torch.stack(torch._foreach_norm([*a, *b])).chunk(2)
    return first, second


def _slots(state: dict[Any, dict[str, Any]], params: list[Tensor], name: str) -> list[Tensor]:
    """The state `name` of each parameter, zeros at first."""
    for p in params:
        if name not in state[p]:
            state[p][name] = torch.zeros_like(p)
    return [state[p][name] for p in params]


def _add_scaled(to: list[Tensor], factors: TensorList | None, what: TensorList, scale: float) -> None:
    """to += scale factor what, with a 0-dim factor for each tensor; None: factor 1."""
    if factors is None:
        torch._foreach_add_(to, what, alpha=scale)
    else:
        torch._foreach_addcmul_(to, factors, what, scale)
