"""Optimizers by name, and the learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from torch import nn

from ...errors import ConfigError, unknown_name
from .adaptive import Groups, Lamb, Lars
from .schedule import learning_rate

__all__ = [
    "OPTIMIZERS",
    "OPTIMIZER_SETTINGS",
    "Lamb",
    "Lars",
    "build_optimizer",
    "learning_rate",
    "set_learning_rate",
]


def _sgd(groups: Groups, settings: dict[str, Any]) -> torch.optim.Optimizer:
    # not fused: the fused form fails when a parameter gets its first gradient later than others
    return torch.optim.SGD(groups, momentum=settings["momentum"], nesterov=settings["nesterov"], foreach=True)


def _adamw(groups: Groups, settings: dict[str, Any]) -> torch.optim.Optimizer:
    betas = (settings["momentum"], settings["beta2"])
    return torch.optim.AdamW(groups, betas=betas, eps=settings["eps"] or 1e-8, fused=True)


def _lars(groups: Groups, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return Lars(
        groups,
        momentum=settings["momentum"],
        nesterov=settings["nesterov"],
        eta=settings["lars_eta"],
        clip=settings["lars_clip"],
        eps=settings["eps"] or 0.0,
    )


def _lamb(groups: Groups, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return Lamb(
        groups,
        betas=(settings["momentum"], settings["beta2"]),
        eps=settings["eps"] or 1e-6,
        norm_range=settings["lamb_norm_range"],
    )


OPTIMIZERS: dict[str, Callable[[Groups, dict[str, Any]], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "lars": _lars,
    "lamb": _lamb,
}

OPTIMIZER_SETTINGS = {
    "name",
    "momentum",
    "nesterov",
    "weight_decay",
    "decay",
    "beta2",
    "eps",
    "lars_eta",
    "lars_clip",
    "lamb_norm_range",
}
"""Settings of the configuration's optim section that are arguments of `build_optimizer`."""


def build_optimizer(
    params: list[nn.Parameter],
    *,
    name: str,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay: Literal["weights", "all"] = "weights",
    beta2: float = 0.999,
    eps: float | None = None,
    lars_eta: float = 0.001,
    lars_clip: bool = False,
    lamb_norm_range: tuple[float, float] | None = None,
    constant: Collection[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The optimizer called `name` with two groups: weights, and norms and biases.

    Parameters with at most one dimension (biases, the scales of BatchNorm and LayerNorm, a learned temperature)
    have no weight decay unless `decay` is "all", and LARS and LAMB do not adapt their learning rate. `momentum` is
    beta 1 of AdamW and LAMB; `eps` None is the optimizer's own default. Parameters in `constant` get two groups of
    their own, whose learning rate `set_learning_rate` leaves as it is.

    Raises ConfigError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ConfigError("optim.name: " + unknown_name("optimizer", name, OPTIMIZERS))
    settings = {
        "momentum": momentum,
        "nesterov": nesterov,
        "beta2": beta2,
        "eps": eps,
        "lars_eta": lars_eta,
        "lars_clip": lars_clip,
        "lamb_norm_range": lamb_norm_range,
    }
    fixed = {id(p) for p in constant}
    groups: Groups = []
    for is_constant in [False, True] if fixed else [False]:
        own = [p for p in params if (id(p) in fixed) == is_constant]
        shared = {"lr": lr, "constant_lr": is_constant} if is_constant else {"lr": lr}
        weights, others = [p for p in own if p.ndim > 1], [p for p in own if p.ndim <= 1]
        groups.append({"params": weights, "weight_decay": weight_decay, **shared})
        groups.append({"params": others, "weight_decay": weight_decay if decay == "all" else 0.0, **shared})
        if name in ("lars", "lamb"):
            groups[-1]["adapt"] = False
    return OPTIMIZERS[name](groups, settings)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of all groups but those whose learning rate is constant."""
    for group in optimizer.param_groups:
        if not group.get("constant_lr"):
            group["lr"] = lr
