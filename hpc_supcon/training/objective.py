"""What training minimizes: a weighted sum of losses, each computed from one head of the model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data import ImageViews
from ..distributed.collectives import all_sum, gather_sizes, rank, world_size
from ..losses import (
    DINOLoss,
    MoCoLoss,
    SwAVLoss,
    alignment_and_uniformity,
    effective_rank,
    embedding_std,
    gradient_response,
    loss_spec,
    mean_similarity,
)
from ..models import PretrainingModel
from ..phases import phase
from .ema import MomentumTarget

# Losses that weigh positives and negatives as losses.gradient_response does.
GRADIENT_RESPONSE_LOSSES = ("supcon_out", "tcl")
MAX_RANK_WIDTH = 1024
"""Widest embeddings whose effective rank is logged: it takes width^3, 1 ms for 128 and half a second for 2048."""


class Objective(nn.Module):
    """A weighted sum of losses: (outputs of the heads, views, labels) -> the mean over all ranks, 0-dim.

    The value is the same on every rank; the average over ranks of the gradients is the gradient of one process
    that has the whole batch.

    What a loss keeps from step to step is part of it and of its state: a momentum target, a queue of keys.
    """

    target: MomentumTarget | None

    def __init__(
        self,
        terms: Mapping[str, float],
        settings: Mapping[str, Any],
        *,
        target: MomentumTarget | None = None,
        denormalize: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Raises ConfigError for a loss that does not exist, or for settings that it refuses.

        `terms`: loss -> its weight. `settings`: the configuration's loss section as a dict. Each loss is given
        those settings that are parameters of it; `supervised` is for all of them. `target`: needed where a loss
        reads it (see `needs_target`). `denormalize`: views -> images in 0..1, needed for a decoder.
        """
        super().__init__()
        self.weights = dict(terms)
        self.specs = {name: loss_spec(name) for name in terms}
        self.supervised = bool(settings["supervised"]) and any(
            spec.pairwise and spec.uses_labels for spec in self.specs.values()
        )
        self.compares_with_keys = settings.get("keys") == "momentum"
        self.loss_of: dict[str, nn.Module] = {}
        for name, spec in self.specs.items():
            arguments = {key: settings[key] for key in spec.parameters if key in settings}
            if "validate" in spec.parameters:
                arguments["validate"] = False  # the training step checks its numbers itself
            self.loss_of[name] = spec.factory(**arguments)
        # the names of modules have no dots, those of a user's own losses may
        self.losses = nn.ModuleDict({name.replace(".", "/"): loss for name, loss in self.loss_of.items()})
        self.target = target
        self._denormalize = denormalize
        self._last: dict[str, Tensor] = {}

    @property
    def heads(self) -> list[str]:
        return heads_of(self.weights)

    def momentum_outputs(self, model: PretrainingModel, views: ImageViews) -> dict[str, Tensor]:
        """What losses read beside the outputs of `model` for views [B, V, C, H, W]: the target's embeddings
        "target" [B, V, D], of the global views where there are several sizes, without gradient; empty without a
        target."""
        if self.target is None:
            return {}
        with phase("target"):
            return {"target": self.target.embeddings(model, views if isinstance(views, Tensor) else views[0])}

    def after_step(
        self, model: PretrainingModel, outputs: Mapping[str, Tensor], step: int, images_per_rank: list[int] | None
    ) -> None:
        """Move the target towards `model`, and let losses keep what they need of this step, after the optimizer step
        number `step`, counted from 0. Collective."""
        for loss in self.losses.values():
            if isinstance(loss, (MoCoLoss, SwAVLoss, DINOLoss)):
                with phase("queue"):
                    loss.after_step(outputs, images_per_rank)
        if self.target is not None:
            with phase("target"):
                also = [
                    pair for loss in self.losses.values() if isinstance(loss, DINOLoss) for pair in loss.followers()
                ]
                self.target.update(model, step, also)

    def forward(
        self,
        outputs: Mapping[str, Tensor],
        views: ImageViews | None,
        labels: Tensor,
        queue: Any = None,
        images_per_rank: list[int] | None = None,
    ) -> Tensor:
        """outputs[head] [B, V, ...], views [B, V, C, H, W] (needed for a decoder only), labels [B].

        `images_per_rank`: B of every rank, where all ranks know it; the ranks then exchange no message about it.
        """
        values = {name: self._term(name, outputs, views, labels, queue, images_per_rank) for name in self.weights}
        self._last = {name: value.detach() for name, value in values.items()}
        # not sum(): it starts from an integer zero, one more operation for the single loss of most runs
        return reduce(operator.add, [v if self.weights[n] == 1 else self.weights[n] * v for n, v in values.items()])

    def _term(
        self,
        name: str,
        outputs: Mapping[str, Tensor],
        views: ImageViews | None,
        labels: Tensor,
        queue: Any,
        images_per_rank: list[int] | None,
    ) -> Tensor:
        spec = self.specs[name]
        if spec.pairwise:
            return self.pairwise(name, outputs, labels, queue, images_per_rank)
        return _mean_over_ranks(self.pointwise(name, outputs[spec.head], views, labels))

    def pairwise(
        self,
        name: str,
        outputs: Mapping[str, Tensor],
        labels: Tensor,
        queue: Any = None,
        images_per_rank: list[int] | None = None,
    ) -> Tensor:
        """A loss over the images of all ranks. Every rank must call this."""
        spec = self.specs[name]
        output = outputs[spec.head]
        if spec.of_views:
            read = [output] if spec.other is None else [output, outputs[spec.other]]
            return self.loss_of[name](*read, images_per_rank=images_per_rank)
        pair_labels = labels if self.supervised else None
        if spec.own:
            return self.loss_of[name](output, pair_labels, images_per_rank=images_per_rank)
        rows = None if images_per_rank is None else [n * output.shape[1] for n in images_per_rank]
        if not spec.contrastive:
            return self.loss_of[name](output, pair_labels, rows_per_rank=rows)
        if queue is not None and not self.supervised:
            queue = (queue[0], None)
        keys = outputs.get("keys") if self.compares_with_keys else None  # validation makes none
        return self.loss_of[name](output, pair_labels, queue=queue, rows_per_rank=rows, keys=keys)

    def pointwise(self, name: str, output: Tensor, views: ImageViews | None, labels: Tensor) -> Tensor:
        """The mean over this rank's images of a loss of single images (of a classifier or decoder)."""
        if self.specs[name].head == "classifier":
            return self.loss_of[name](output.flatten(0, 1), labels.repeat_interleave(output.shape[1]))
        assert isinstance(views, Tensor)
        return self.loss_of[name](output, self.targets(views))

    def targets(self, views: Tensor) -> Tensor:
        """What a decoder must reconstruct: the views' pixels, scaled to -1..1."""
        assert self._denormalize is not None
        return self._denormalize(views) * 2 - 1

    def statistics(self) -> dict[str, Tensor]:
        """Numbers of the last call for the log (0-dim): each loss's own statistics, a learned temperature, and
        the value of each loss of a sum."""
        numbers: dict[str, Tensor] = {}
        for name, loss in self.loss_of.items():
            own = dict(getattr(loss, "stats", {}))
            if getattr(loss, "log_temperature", None) is not None:
                own["temperature"] = cast(Tensor, loss.temperature).detach()
            if len(self.losses) > 1:
                own["loss"] = self._last[name]
            numbers |= {f"{name}_{key}" if len(self.losses) > 1 else key: value for key, value in own.items()}
        return numbers

    def embedding_numbers(self, outputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Mean cosine similarity, alignment of positives, uniformity, standard deviation (`losses.embedding_std`) and
        effective rank (see MAX_RANK_WIDTH) of the batch's embeddings; empty for a loss that reads no projection.

        labels [B]. Every rank must call this.
        """
        if "projection" not in outputs:
            return {}
        embeddings = outputs["projection"]
        # of an unsupervised loss, the positives of a view are the other views of its image
        supervised = self.supervised and not any(spec.of_views for spec in self.specs.values())
        groups = labels if supervised else torch.arange(len(labels), device=labels.device) + _before(labels)
        groups = groups[:, None].expand(-1, embeddings.shape[1])
        alignment, uniformity = alignment_and_uniformity(embeddings, groups)
        numbers = {"mean_similarity": mean_similarity(embeddings), "alignment": alignment, "uniformity": uniformity}
        numbers["embedding_std"] = embedding_std(embeddings)
        if embeddings.shape[-1] <= MAX_RANK_WIDTH:
            numbers["effective_rank"] = effective_rank(embeddings)
        return numbers

    def gradient_response(self, outputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """How strongly the loss attracts positives and repels negatives: see `losses.gradient_response`.

        Every rank must call this. Only for an objective of which `gradient_response_loss` is not None.
        """
        name = gradient_response_loss(self.weights)
        assert name is not None
        loss: Any = self.loss_of[name]
        found = gradient_response(
            outputs[self.specs[name].head].detach(),
            labels,
            float(loss.temperature),
            getattr(loss, "k1", 0.0),
            getattr(loss, "k2", 1.0),
        )
        return {"response_positives": found.positives, "response_negatives": found.negatives}


def heads_of(terms: Iterable[str]) -> list[str]:
    """The heads that the losses need, each once, in the order of `terms`; a projection comes before its predictor."""
    specs = [loss_spec(name) for name in terms]
    before = {"prediction": ["projection", "prediction"]}
    return list(dict.fromkeys(head for spec in specs for head in before.get(spec.head, [spec.head])))


def needs_target(terms: Iterable[str]) -> bool:
    """Whether a loss reads the embeddings of a momentum target."""
    return any(loss_spec(name).other == "target" for name in terms)


def gradient_response_loss(terms: Iterable[str]) -> str | None:
    """The one loss among `terms` that gradient responses are defined for; None unless there is exactly one."""
    found = [name for name in terms if name in GRADIENT_RESPONSE_LOSSES]
    return found[0] if len(found) == 1 else None


def _before(labels: Tensor) -> int:
    """How many images the ranks before this one have. Collective."""
    return sum(gather_sizes(labels)[: rank()])


def _mean_over_ranks(loss: Tensor) -> Tensor:
    """The mean over ranks as value, this rank's loss for the gradient: data-parallel training averages gradients."""
    ranks = world_size()
    return loss if ranks == 1 else loss + (all_sum(loss) / ranks - loss.detach())
