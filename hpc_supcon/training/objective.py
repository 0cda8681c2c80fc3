"""What is minimised: a loss by name, the head whose output it reads, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..collectives import all_sum, world_size
from ..errors import ConfigError, unknown_name
from ..losses import LOSSES, gradient_response
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
    """The loss called `name`: (head outputs, views, labels) -> the mean over all ranks, a scalar.

    The value is the same on every rank; the average over ranks of the gradients is that of one process.
    """

    def __init__(
        self, name: str, settings: Mapping[str, Any], *, denormalise: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """`settings`: at least those of the loss's Kind. `denormalise`: views -> images in 0..1, for a decoder."""
        super().__init__()
        self.name = name
        self.kind = kind_of(name)
        chosen = {key: settings[key] for key in self.kind.settings}
        # the training loop stops on a non-finite loss itself
        unchecked = {"validate": False} if self.kind.head in ("projection", "features") else {}
        self.loss: Any = LOSSES[name](**chosen, **unchecked)
        self.settings = chosen
        self._denormalise = denormalise

    def forward(
        self, outputs: Mapping[str, Tensor], views: Tensor | None, labels: Tensor, queue: Any = None
    ) -> Tensor:
        """outputs[head] [B, V, ...], views [B, V, C, H, W] (for a decoder only), labels [B]."""
        output = outputs[self.kind.head]
        if self.kind.contrastive:
            return self.loss(output, labels, queue=queue)
        if self.kind.head == "features":
            return self.loss(output, labels)
        if self.kind.head == "classifier":
            return _mean_of_ranks(self.loss(output.flatten(0, 1), labels.repeat_interleave(output.shape[1])))
        assert views is not None
        assert self._denormalise is not None
        return _mean_of_ranks(self.loss(output, self._denormalise(views) * 2 - 1))

    def statistics(self) -> dict[str, Tensor]:
        """What the last call saw (0-dim tensors), and a learned temperature."""
        numbers = dict(getattr(self.loss, "stats", {}))
        if getattr(self.loss, "log_temperature", None) is not None:
            numbers["temperature"] = self.loss.log_temperature.detach().exp()
        return numbers

    def response(self, outputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """How strongly the batch's positives pull and negatives push (lemmas 1 and 2 of Tuned Contrastive Learning).

        Collective.
        """
        found = gradient_response(
            outputs[self.kind.head].detach(),
            labels,
            float(self.loss.temperature),
            self.settings.get("k1", 0.0),
            self.settings.get("k2", 1.0),
        )
        return {"response_positives": found.positives, "response_negatives": found.negatives}


def _mean_of_ranks(loss: Tensor) -> Tensor:
    """The mean over ranks as value, the own part as gradient: data-parallel training averages gradients."""
    ranks = world_size()
    return loss if ranks == 1 else loss + (all_sum(loss) / ranks - loss.detach())
