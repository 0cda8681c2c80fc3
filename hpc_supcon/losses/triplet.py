"""Triplet margin loss with positives and negatives mined within the batch of all ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..errors import ConfigError, unknown_name
from .gathered import dense_ids
from .pairwise import mean_and_sums
from .validation import prepare

MINING = ("random", "semihard", "hard")
# Rows of the distance matrix that mining holds at a time.
_CHUNK = 1024


class TripletLoss(nn.Module):
    """max(d(a, p) - d(a, n) + margin, 0), one triplet per anchor, meaned over the anchors of all ranks.

    d is the squared Euclidean distance, or the Euclidean one with `squared=False`, of the embeddings AS
    GIVEN: they are not normalized, as in the VGG-16 recipe this follows. Mining, over the rows of all ranks:

        random    a random positive and a random negative
        semihard  a random positive; the nearest negative farther than it, else the farthest negative
                  (Schroff et al., 2015, with one positive per anchor)
        hard      the farthest positive, the nearest negative (Hermans et al., 2017, "batch hard")

    An anchor without a positive or without a negative is skipped; if all are, the loss is a
    differentiable zero. `stats` holds, after a call: `anchors_without_triplet` and `active_fraction`
    (triplets inside the margin), over all ranks.
    """

    def __init__(
        self,
        margin: float = 1.0,
        mining: str = "random",
        squared: bool = True,
        *,
        gather: bool = True,
        validate: bool = True,
    ) -> None:
        super().__init__()
        if mining not in MINING:
            raise ConfigError(unknown_name("triplet mining", mining, MINING))
        if not (math.isfinite(margin) and margin >= 0):
            raise ConfigError(f"margin must be a finite number >= 0; got {margin}")
        self.margin, self.mining, self.squared = margin, mining, squared
        self.gather, self.validate = gather, validate
        self.stats: dict[str, Tensor] = {}

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        rows_per_rank: list[int] | None = None,
    ) -> Tensor:
        """features [B, V, D] or [N, D], labels [B] or [N] or None (an image's views) -> 0-dim loss.

        `generator` draws the random positives and negatives of this rank; None is torch's global one.
        `rows_per_rank`: see `pairwise_stats`. Raises LossInputError, the same on every rank.
        """
        anchors = prepare(features, labels, gather=self.gather, validate=self.validate, rows_per_rank=rows_per_rank)
        with torch.autocast(features.device.type, enabled=False):
            own = anchors.rows if features.dtype == torch.float64 else anchors.rows.float()
            rows, row_labels = own, anchors.labels
            if len(anchors.rows_per_rank) > 1:
                rows = collectives.gather_rows_with_grad(own, anchors.rows_per_rank)
                row_labels = collectives.gather_rows(anchors.labels, anchors.rows_per_rank)
            sampled = _sample(row_labels, anchors.offset, len(own), generator)
            positive, negative, valid = sampled
            if self.mining != "random":
                positive, negative = _mine(
                    self.mining, own.detach(), rows.detach(), anchors.labels, row_labels, anchors.offset, positive
                )
            to_positive = self._distance(own, rows.index_select(0, positive))
            to_negative = self._distance(own, rows.index_select(0, negative))
            per_anchor = torch.relu(to_positive - to_negative + self.margin)
            active = (valid & (per_anchor > 0)).sum()
            count = per_anchor.new_full((), len(own), dtype=torch.float64)
            loss, (used, active, count) = mean_and_sums(per_anchor, valid, [active, count], gather=self.gather)
        self.stats = {"anchors_without_triplet": count - used, "active_fraction": active / used.clamp(min=1)}
        return loss

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        if self.squared:
            return (a - b).square().sum(1)
        return torch.linalg.vector_norm(a - b, dim=1)


def _sample(labels: Tensor, offset: int, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """A uniformly random positive and negative of rows offset .. offset + n, and which rows have both.

    In the order of the classes, a class is one interval: a draw is an index into the interval (past the
    anchor) or into the rest (past the interval). O(N), where masks would be N x N.
    """
    total = len(labels)
    order = labels.argsort(stable=True)
    ids = dense_ids(labels)
    position = torch.empty_like(order).index_copy_(0, order, torch.arange(total, device=labels.device))
    members = torch.zeros_like(ids).index_add_(0, ids, torch.ones_like(ids))
    first = members.cumsum(0) - members
    own = slice(offset, offset + n)
    start, size, place = first[ids[own]], members[ids[own]], position[own]
    device = labels.device if generator is None else generator.device
    draw = torch.rand(2, n, generator=generator, device=device, dtype=torch.float64).to(labels.device)
    # Rows without a positive or negative point at row 0 and are masked out by `valid`.
    other = 1 + (draw[0] * (size - 1)).long()
    positive = start + (place - start + other) % size.clamp(min=1)
    negative = (start + size + (draw[1] * (total - size)).long()) % max(total, 1)
    valid = (size > 1) & (size < total)
    return order[positive], order[negative], valid


def _mine(
    mining: str, own: Tensor, rows: Tensor, own_labels: Tensor, labels: Tensor, offset: int, positive: Tensor
) -> tuple[Tensor, Tensor]:
    """Indices of the positive and negative of every own row; arbitrary where there is none."""
    pairs = []
    for start in range(0, len(own), _CHUNK):
        part = slice(start, min(start + _CHUNK, len(own)))
        distance = torch.cdist(own[part], rows, compute_mode="donot_use_mm_for_euclid_dist")
        same = own_labels[part, None] == labels[None, :]
        nearest_negative = distance.masked_fill(same, float("inf")).argmin(1)
        if mining == "hard":
            # The anchor itself, at distance zero, is the farthest only where every positive is there too.
            itself = torch.arange(part.start + offset, part.stop + offset, device=own.device)
            candidates = distance.masked_fill(~same, -1.0).scatter_(1, itself[:, None], -1.0)
            pairs.append((candidates.argmax(1), nearest_negative))
            continue
        reach = distance.gather(1, positive[part, None])
        beyond = distance.masked_fill(same | (distance <= reach), float("inf"))
        farthest_negative = distance.masked_fill(same, -1.0).argmax(1)
        has_beyond = torch.isfinite(beyond).any(1)
        pairs.append((positive[part], torch.where(has_beyond, beyond.argmin(1), farthest_negative)))
    if not pairs:
        return positive, positive
    first, second = zip(*pairs, strict=True)
    return torch.cat(first), torch.cat(second)
