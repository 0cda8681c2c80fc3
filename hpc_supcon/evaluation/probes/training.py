"""Training of classifier heads on rows that are all in memory: features or pixels."""

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
from ..features import CHUNK, LabeledRows, in_chunks
from .optimization import (
    FitPlan,
    FitProgress,
    batches,
    best_head,
    build_optimizer,
    scale_lr,
    split_decayed,
    steps_per_epoch,
)


@dataclass(frozen=True)
class Trained:
    """The classifier that was kept, in eval mode, and how it was trained."""

    head: nn.Module
    lr: float
    iteration: int
    """Optimizer steps until the state that was kept."""
    epoch: float
    """The same in passes over the rows."""
    iterations: int
    """Optimizer steps until training ended."""
    history: list[dict[str, Any]]
    """For each evaluation: iteration, lr, train_loss, train_accuracy, and validation_* with a validation split."""


def train_heads(
    heads: Heads, prepare: nn.Module, train: LabeledRows, validation: LabeledRows | None, plan: FitPlan, *, seed: int
) -> Trained:
    """`train_on_batches` of the rows of `train`, in a new random order in every epoch.

    prepare: rows -> what the heads read. train, validation: ALL rows on every rank.
    """
    x, labels = train
    if validation is not None:
        validation = (in_chunks(prepare, validation[0]), validation[1])
    order = batches(len(x), plan.batch_size, torch.Generator().manual_seed(seed))
    drawn = ((prepare(x[rows]), labels[rows]) for rows in (rows.to(x.device) for rows in order))
    return train_on_batches(heads, drawn, steps_per_epoch(len(x), plan.batch_size), validation, plan)


def train_on_batches(
    heads: Heads, train: Iterator[LabeledRows], per_epoch: int, validation: LabeledRows | None, plan: FitPlan
) -> Trained:
    """Train one head for each of `plan.lrs` side by side; keep the best state of the best head.

    train: batches of what the heads read, without end, `per_epoch` of them in an epoch. Every rank has the same
    batches and the same validation rows, and trains the same heads, which costs less than exchanging gradients at
    every step and gives the same result on any number of ranks. The validation split chooses; ties go to the earlier
    evaluation and the first rate. Without validation there must be one learning rate, and the last state is kept.
    Losses in the history are mean cross-entropies without the L2 term; those on train are averaged over the batches
    since the previous evaluation, each before its update. Raises NonFinite. Collective.
    """
    progress = FitProgress(plan, per_epoch)
    groups = [(heads.head_parameters(k), lr) for k, lr in enumerate(plan.lrs)]
    optimizer = build_optimizer(groups, name=plan.optimizer, weight_decay=plan.weight_decay, decay=plan.decay)
    best, best_k, best_at, rows_seen = heads.one(0), 0, 0, 0
    sums = torch.zeros(2, len(plan.lrs), dtype=torch.float64, device=heads.head_parameters(0)[0].device)
    for i, (x, labels) in enumerate(islice(train, progress.total), 1):
        factor = plan.lr_factor(i - 1, progress.total)
        scale_lr(optimizer, factor)
        sums += _step(heads, optimizer, x, labels, plan)
        rows_seen += len(x)
        if progress.due(i):
            numbers, value, k = _evaluate(heads, validation, sums / rows_seen, plan.monitor)
            if progress.record(i, value, lr=[factor * lr for lr in plan.lrs], **numbers):
                best, best_k, best_at = heads.one(k), k, i
            sums, rows_seen = torch.zeros_like(sums), 0
            if progress.stop:
                break
    with propagate_errors():
        if not best_at or not all(bool(p.isfinite().all()) for p in best.parameters()):
            raise NonFinite(f"the probe's loss became NaN or Inf at learning rate {plan.lrs[best_k]:g}: lower it")
    # every rank computed the same; in case their devices rounded differently, all take the result of rank 0
    results: list[Any] = gather_objects((best_k, best_at, i, progress.history) if rank() == 0 else None)
    best_k, best_at, i, history = results[0]
    best.load_state_dict({name: _from_rank_0(tensor) for name, tensor in best.state_dict().items()})
    lines = [{name: v[best_k] if isinstance(v, list) else v for name, v in point.items()} for point in history]
    return Trained(best, plan.lrs[best_k], best_at, best_at / per_epoch, i, lines)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global generators inside (initial weights, dropout); afterwards their states are as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _step(heads: Heads, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, plan: FitPlan) -> Tensor:
    """One update of every head; [2, K]: sums of losses and of correct predictions over the rows, before it."""
    logits = heads(x)
    losses = _losses(logits, labels)
    # the sum over heads of each head's mean: no head's gradient depends on another head
    loss = losses.sum() / len(labels)
    by_head = [heads.head_parameters(k) for k in range(len(plan.lrs))]
    if plan.l2_lambda:
        weights = [w for parameters in by_head for w in split_decayed(parameters)[0]]
        loss = loss + plan.l2_lambda * torch.stack([w.square().sum() for w in weights]).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if plan.clip_norm is not None:
        for parameters in by_head:
            nn.utils.clip_grad_norm_(parameters, plan.clip_norm)
    optimizer.step()
    return torch.stack([losses.detach().double().sum(dim=1), _correct(logits, labels).double()])


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [K, n] of logits [K, n, C]."""
    flat = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
    return flat.view(logits.shape[:2])


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    """[K]: each head's number of correct predictions, of logits [K, n, C]."""
    return (logits.detach().argmax(dim=2) == labels).sum(dim=1)


def _evaluate(
    heads: Heads, validation: LabeledRows | None, train: Tensor, monitor: str
) -> tuple[dict[str, Any], float | None, int]:
    """(each head's numbers for the history, the monitored number of the best head, index of the best head).

    train: [2, K], mean loss and accuracy while training. Without validation there is one head and no number to
    monitor.
    """
    numbers = {"train_loss": train[0].tolist(), "train_accuracy": train[1].tolist()}
    if validation is None:
        return numbers, None, 0
    loss, accuracy = evaluate_heads(heads, validation).cpu()
    k, value = best_head(loss, accuracy, monitor)
    return {**numbers, "validation_loss": loss.tolist(), "validation_accuracy": accuracy.tolist()}, value, k


@torch.no_grad()
def evaluate_heads(heads: Heads, rows: LabeledRows) -> Tensor:
    """float64 [2, K]: mean cross-entropy and accuracy (0..1) of every head on prepared rows."""
    heads.train(False)
    sums = []
    for x, labels in zip(rows[0].split(CHUNK), rows[1].split(CHUNK), strict=True):
        logits = heads(x)
        sums.append(torch.stack([_losses(logits, labels).double().sum(dim=1), _correct(logits, labels).double()]))
    heads.train(True)
    return torch.stack(sums).sum(dim=0) / len(rows[0])


def _from_rank_0(value: Tensor) -> Tensor:
    return all_sum(value if rank() == 0 else torch.zeros_like(value))
