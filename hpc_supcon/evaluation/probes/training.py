"""The one training loop of classifiers on rows that are all at hand: features or pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...distributed.collectives import all_sum, gather_objects, propagate_errors, rank
from ...errors import NonFinite
from ...models import Heads
from ..features import CHUNK, Part, in_chunks
from .watch import Plan, Watch, batches, best_head, build_stepper, decayed, set_share, steps_per_epoch


@dataclass(frozen=True)
class Trained:
    """The head that was kept, in eval mode, and how it came about."""

    head: nn.Module
    lr: float
    iteration: int
    """Optimizer steps until the state that was kept."""
    epoch: float
    """The same in passes over the rows."""
    iterations: int
    """Optimizer steps until training ended."""
    history: list[dict[str, Any]]
    """Of each evaluation: iteration, lr, train_loss, train_accuracy, and validation_* with a validation split."""


def train_heads(
    heads: Heads, prepare: nn.Module, train: Part, validation: Part | None, plan: Plan, *, seed: int
) -> Trained:
    """Train one head for each of `plan.lrs` side by side; keep the best state of the best head.

    train, validation: ALL rows on every rank: each trains the same heads, which costs less than a gradient
    message per step and gives the same result on any number of ranks. The validation split chooses, ties going
    to the earlier evaluation and the first rate. Without validation there must be one learning rate, and the
    last state is kept. Losses in the history are mean cross-entropies without the L2 term; those on train are
    means over the batches since the evaluation before, taken while training. Raises NonFinite. Collective.
    """
    x, labels = train
    if validation is not None:
        validation = (in_chunks(prepare, validation[0]), validation[1])
    watch = Watch(plan, steps_per_epoch(len(x), plan.batch_size))
    groups = [(heads.head_parameters(k), lr) for k, lr in enumerate(plan.lrs)]
    stepper = build_stepper(groups, optimizer=plan.optimizer, weight_decay=plan.weight_decay)
    order = batches(len(x), plan.batch_size, torch.Generator().manual_seed(seed))
    kept, best_k, at, seen = heads.one(0), 0, 0, 0
    sums = torch.zeros(2, len(plan.lrs), dtype=torch.float64, device=x.device)
    for i, rows in enumerate(islice(order, watch.total), 1):
        rows, share = rows.to(x.device), plan.lr_at(i - 1, watch.total)
        set_share(stepper, share)
        sums += _step(heads, stepper, prepare(x[rows]), labels[rows], plan)
        seen += len(rows)
        if watch.due(i):
            numbers, value, k = _look(heads, validation, sums / seen, plan.monitor)
            if watch.note(i, value, lr=[share * lr for lr in plan.lrs], **numbers):
                kept, best_k, at = heads.one(k), k, i
            sums, seen = torch.zeros_like(sums), 0
            if watch.stop:
                break
    with propagate_errors():
        if not at or not all(bool(p.isfinite().all()) for p in kept.parameters()):
            raise NonFinite(f"the probe's loss became NaN or Inf at learning rate {plan.lrs[best_k]:g}: lower it")
    # every rank computed the same; should devices have rounded otherwise, rank 0's is everybody's
    said: list[Any] = gather_objects((best_k, at, i, watch.history) if rank() == 0 else None)
    best_k, at, i, history = said[0]
    kept.load_state_dict({name: _of_rank_0(tensor) for name, tensor in kept.state_dict().items()})
    lines = [{name: v[best_k] if isinstance(v, list) else v for name, v in point.items()} for point in history]
    return Trained(kept, plan.lrs[best_k], at, at / steps_per_epoch(len(x), plan.batch_size), i, lines)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global generators from `seed` inside (first weights, dropout), and as they were afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _step(heads: Heads, stepper: torch.optim.Optimizer, x: Tensor, labels: Tensor, plan: Plan) -> Tensor:
    """One update of every head; [2, K]: sums of loss and of right answers over the rows, before it."""
    logits = heads(x)
    losses = _losses(logits, labels)
    # the sum over heads of each head's mean: no head's gradient depends on another
    loss = losses.sum() / len(labels)
    owned = [heads.head_parameters(k) for k in range(len(plan.lrs))]
    if plan.l2_lambda:
        weights = [w for parameters in owned for w in decayed(parameters)[0]]
        loss = loss + plan.l2_lambda * torch.stack([w.square().sum() for w in weights]).sum()
    stepper.zero_grad(set_to_none=True)
    loss.backward()
    if plan.clip_norm is not None:
        for parameters in owned:
            nn.utils.clip_grad_norm_(parameters, plan.clip_norm)
    stepper.step()
    return torch.stack([losses.detach().double().sum(dim=1), _right(logits, labels).double()])


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits [K, n, C] for each head and row [K, n]."""
    flat = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
    return flat.view(logits.shape[:2])


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(dim=2) == labels).sum(dim=1)


def _look(
    heads: Heads, validation: Part | None, train: Tensor, monitor: str
) -> tuple[dict[str, Any], float | None, int]:
    """(numbers of each head for the history, the monitored one of the best head, which head that is)."""
    numbers = {"train_loss": train[0].tolist(), "train_accuracy": train[1].tolist()}
    if validation is None:
        return numbers, None, 0
    loss, accuracy = evaluate_heads(heads, validation).cpu()
    k, value = best_head(loss, accuracy, monitor)
    return {**numbers, "validation_loss": loss.tolist(), "validation_accuracy": accuracy.tolist()}, value, k


@torch.no_grad()
def evaluate_heads(heads: Heads, part: Part) -> Tensor:
    """float64 [2, K]: mean cross-entropy and accuracy (0..1) of every head on these prepared rows."""
    heads.train(False)
    sums = []
    for x, labels in zip(part[0].split(CHUNK), part[1].split(CHUNK), strict=True):
        logits = heads(x)
        sums.append(torch.stack([_losses(logits, labels).double().sum(dim=1), _right(logits, labels).double()]))
    heads.train(True)
    return torch.stack(sums).sum(dim=0) / len(part[0])


def _of_rank_0(value: Tensor) -> Tensor:
    return all_sum(value if rank() == 0 else torch.zeros_like(value))
