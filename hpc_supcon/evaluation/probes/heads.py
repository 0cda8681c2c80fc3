"""The probes that train a head on rows: linear, softmax, logistic, mlp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...models import Heads, LinearHeads, Logistic, Mlp, SingleHead
from ..features import fit_standardization
from ..fitted_probe import FittedProbe
from .base import Outcome, Task, input_of, only, pair_of
from .training import seeded, train_heads
from .watch import Plan

_MLP = ("hidden", "batch_norm", "dropout")

HEADS: dict[str, Callable[[Any, int, int], Heads]] = {
    "linear": lambda settings, in_dim, classes: LinearHeads(len(settings.lrs), in_dim, classes),
    "softmax": lambda settings, in_dim, classes: LinearHeads(1, in_dim, classes),
    "logistic": lambda settings, in_dim, classes: SingleHead(Logistic(in_dim)),
    "mlp": lambda settings, in_dim, classes: SingleHead(
        Mlp(in_dim, classes=classes, **settings.model_dump(include=_MLP))
    ),
}


def plan_of(settings: Any) -> Plan:
    """A section of `probe` as a training plan."""
    return Plan(
        lrs=settings.lrs if hasattr(settings, "lrs") else (settings.lr,),
        monitor=settings.stopping.monitor,
        stopping=settings.stopping.model_dump(exclude={"monitor"}),
        l2_lambda=getattr(settings, "l2_lambda", 0.0),
        clip_norm=getattr(settings, "clip_norm", None),
        **{
            name: getattr(settings, name)
            for name in (
                "epochs", "iterations", "evaluate_every", "batch_size", "optimizer", "weight_decay", "schedule",
            )
        },
    )  # fmt: skip


def fit_head(kind: str, task: Task) -> Outcome:
    """Train the head of `kind` on all training rows, on every rank alike. Collective. Raises NonFinite."""
    settings = getattr(task.config.probe, kind)
    source, classes = input_of(kind, settings), task.classes
    train, validation = task.inputs.whole("train", source), task.inputs.whole("validation", source)
    assert train is not None
    if kind == "logistic":
        pair = pair_of(settings.classes, classes)
        classes = (classes[pair[0]], classes[pair[1]])
        train, validation = only(train, pair), only(validation, pair) if validation is not None else None
    in_dim = train[0][0].numel()
    description = {
        "kind": kind,
        "input": source,
        "classes": list(classes),
        "normalization": task.description["normalization"],
        "standardize": settings.standardize,
        "in_dim": in_dim,
        "encoder": None,
        "head": _describe(kind, settings),
    }
    with seeded(task.config.seed, task.runtime.device):
        fitted = FittedProbe(description, head=nn.Identity()).to(task.runtime.device)
        if settings.standardize:
            fit_standardization(fitted.prepare, train[0])
        heads: Any = HEADS[kind](settings, in_dim, len(classes))
        trained = train_heads(
            heads.to(task.runtime.device), fitted.prepare, train, validation, plan_of(settings), seed=task.config.seed
        )
    fitted.head = trained.head
    chosen: dict[str, Any] = {"lr": trained.lr, "iteration": trained.iteration, "epoch": round(trained.epoch, 3)}
    if kind == "logistic":
        chosen["classes"] = list(classes)
    return Outcome(fitted.eval(), chosen, trained.history, {"iterations": trained.iterations})


def _describe(kind: str, settings: Any) -> dict[str, Any]:
    if kind == "mlp":
        options = settings.model_dump(mode="json", include=set(_MLP))
        return {"name": "mlp", "options": options}
    return {"name": "logistic" if kind == "logistic" else "linear", "options": {}}
