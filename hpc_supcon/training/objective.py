"""What is minimized: losses by name with their weights, the heads whose outputs they read, how they are called."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

from torch import Tensor, nn

from ..distributed.collectives import all_sum, world_size
from ..errors import ConfigError, unknown_name
from ..losses import LOSSES, gradient_response, mean_similarity
from ..models import Projection, build_decoder


@dataclass(frozen=True)
class Kind:
    """`head` of the model that the loss reads; `settings` of the configuration's loss section that it takes.

    `contrastive`: spans all ranks and takes queue columns; `needs_pairs`: an image needs a partner of its
    class in the batch, or a second view.
    """

    head: str
    settings: tuple[str, ...]
    contrastive: bool = False
    needs_pairs: bool = False


_ENGINE = ("temperature", "learnable_temperature", "backend")
KINDS = {
    "supcon_out": Kind("projection", (*_ENGINE, "base_temperature"), contrastive=True, needs_pairs=True),
    "supcon_in": Kind("projection", (*_ENGINE, "base_temperature"), contrastive=True, needs_pairs=True),
    "tcl": Kind("projection", (*_ENGINE, "k1", "k2"), contrastive=True, needs_pairs=True),
    "simclr": Kind("projection", _ENGINE, contrastive=True),
    "triplet": Kind("features", ("margin", "mining", "squared"), needs_pairs=True),
    "cross_entropy": Kind("classifier", ()),
    "cross_entropy_mae": Kind("classifier", ()),
    "reconstruction": Kind("decoder", ("alpha",)),
}
# Heads whose losses compare images; the others look at one at a time.
PAIRED = ("projection", "features")
# Queries and keys with labels; these losses weigh positives and negatives as gradient_response does.
RESPONSE = ("supcon_out", "tcl")


def kind_of(name: str) -> Kind:
    """Raises ConfigError, with the list, for a loss that does not exist."""
    if name not in KINDS:
        raise ConfigError("loss.name: " + unknown_name("loss", name, KINDS))
    return KINDS[name]


def build_head(kind: str, description: Mapping[str, Any], feature_dim: int) -> nn.Module:
    """The head called `kind` for the model that `assemble.describe_model` describes."""
    if kind == "projection":
        return Projection(feature_dim, **description["projection"])
    if kind == "features":
        return nn.Identity()
    if kind == "classifier":
        return nn.Linear(feature_dim, len(description["classes"]))
    assert kind == "decoder"
    encoder = description["encoder"]
    return build_decoder(encoder["name"], feature_dim, encoder["in_channels"], encoder["image_size"])


class Objective(nn.Module):
    """A weighted sum of losses: (head outputs, views, labels) -> the mean over all ranks, a scalar.

    The value is the same on every rank; the average over ranks of the gradients is that of one process.
    """

    def __init__(
        self,
        terms: Mapping[str, float],
        settings: Mapping[str, Any],
        *,
        denormalize: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`terms`: loss -> its weight. `settings`: at least those of the losses' Kinds, and `supervised`.

        `denormalize`: views -> images in 0..1, for a decoder.
        """
        super().__init__()
        self.weights = dict(terms)
        self.supervised = bool(settings["supervised"])
        self.kinds = {name: kind_of(name) for name in terms}
        self.losses = nn.ModuleDict()
        for name, kind in self.kinds.items():
            # the training loop stops on a non-finite loss itself
            unchecked = {"validate": False} if kind.head in PAIRED else {}
            self.losses[name] = LOSSES[name](**{key: settings[key] for key in kind.settings}, **unchecked)
        self._denormalize = denormalize
        self._last: dict[str, Tensor] = {}

    @property
    def heads(self) -> list[str]:
        return heads_of(self.weights)

    def forward(
        self,
        outputs: Mapping[str, Tensor],
        views: Tensor | None,
        labels: Tensor,
        queue: Any = None,
        images_per_rank: list[int] | None = None,
    ) -> Tensor:
        """outputs[head] [B, V, ...], views [B, V, C, H, W] (for a decoder only), labels [B].

        images_per_rank: B of every rank, where all of them know it: the ranks then need not agree on it.
        """
        values = {name: self._term(name, outputs, views, labels, queue, images_per_rank) for name in self.weights}
        self._last = {name: value.detach() for name, value in values.items()}
        # not sum(): it starts from an integer zero, one more operation for the single loss of most runs
        return reduce(operator.add, [v if self.weights[n] == 1 else self.weights[n] * v for n, v in values.items()])

    def _term(
        self,
        name: str,
        outputs: Mapping[str, Tensor],
        views: Tensor | None,
        labels: Tensor,
        queue: Any,
        images_per_rank: list[int] | None,
    ) -> Tensor:
        kind = self.kinds[name]
        output = outputs[kind.head]
        if kind.head in PAIRED:
            return self.paired(name, output, labels, queue, images_per_rank)
        return _mean_of_ranks(self.plain(name, output, views, labels))

    def paired(
        self,
        name: str,
        output: Tensor,
        labels: Tensor,
        queue: Any = None,
        images_per_rank: list[int] | None = None,
    ) -> Tensor:
        """The global value of a loss that compares images (contrastive or triplet). Collective."""
        compared = labels if self.supervised else None
        rows = None if images_per_rank is None else [n * output.shape[1] for n in images_per_rank]
        if not self.kinds[name].contrastive:
            return self.losses[name](output, compared, rows_per_rank=rows)
        if queue is not None and not self.supervised:
            queue = (queue[0], None)
        return self.losses[name](output, compared, queue=queue, rows_per_rank=rows)

    def plain(self, name: str, output: Tensor, views: Tensor | None, labels: Tensor) -> Tensor:
        """This rank's mean of a loss that looks at one image at a time (classifier or decoder)."""
        if self.kinds[name].head == "classifier":
            return self.losses[name](output.flatten(0, 1), labels.repeat_interleave(output.shape[1]))
        assert views is not None
        return self.losses[name](output, self.targets(views))

    def targets(self, views: Tensor) -> Tensor:
        """What a decoder is to give back: the views' pixels in -1..1."""
        assert self._denormalize is not None
        return self._denormalize(views) * 2 - 1

    def statistics(self) -> dict[str, Tensor]:
        """What the last call saw (0-dim tensors): every term of a sum, and a learned temperature."""
        numbers: dict[str, Tensor] = {}
        for name, loss in self.losses.items():
            own = dict(getattr(loss, "stats", {}))
            if getattr(loss, "log_temperature", None) is not None:
                own["temperature"] = cast(Tensor, loss.log_temperature).detach().exp()
            if len(self.losses) > 1:
                own["loss"] = self._last[name]
            numbers |= {f"{name}_{key}" if len(self.losses) > 1 else key: value for key, value in own.items()}
        return numbers

    def similarity(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How alike the embeddings of a contrastive loss are, on the average. Collective."""
        compared = any(kind.contrastive for kind in self.kinds.values())
        return {"mean_similarity": mean_similarity(outputs["projection"])} if compared else {}

    def response(self, outputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """How strongly the batch's positives pull and negatives push (lemmas 1 and 2 of Tuned Contrastive Learning).

        Collective.
        """
        name = response_term(self.weights)
        assert name is not None
        loss: Any = self.losses[name]
        found = gradient_response(
            outputs[self.kinds[name].head].detach(),
            labels,
            float(loss.temperature),
            getattr(loss, "k1", 0.0),
            getattr(loss, "k2", 1.0),
        )
        return {"response_positives": found.positives, "response_negatives": found.negatives}


def heads_of(terms: Iterable[str]) -> list[str]:
    """The heads that the losses read, each once, in their order."""
    return list(dict.fromkeys(kind_of(name).head for name in terms))


def response_term(terms: Iterable[str]) -> str | None:
    """The one loss among `terms` that gradient responses are defined for; None unless there is exactly one."""
    found = [name for name in terms if name in RESPONSE]
    return found[0] if len(found) == 1 else None


def _mean_of_ranks(loss: Tensor) -> Tensor:
    """The mean over ranks as value, the own part as gradient: data-parallel training averages gradients."""
    ranks = world_size()
    return loss if ranks == 1 else loss + (all_sum(loss) / ranks - loss.detach())
