"""Triplet margin loss, its positives and negatives chosen from the batches of all ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..errors import ConfigError, unknown_name
from .gathered import consecutive_ids
from .pairwise import mean_and_sums
from .validation import prepare_anchors

MINING = ("random", "semihard", "hard")
# Rows of the distance matrix that mining computes at a time.
_CHUNK = 1024


class TripletLoss(nn.Module):
    """max(d(a, p) - d(a, n) + margin, 0), one triplet per anchor, averaged over the anchors of all ranks.

    d is the squared Euclidean distance, or with `squared=False` the Euclidean distance, of the features as given:
    they are not normalized, as in the VGG-16 recipe this follows. `mining` chooses p and n among the rows of all
    ranks:

        random    a random positive and a random negative
        semihard  a random positive, and the nearest negative that is farther away than it; where there is none,
                  the farthest negative (Schroff et al. 2015, with one positive per anchor)
        hard      the farthest positive and the nearest negative (Hermans et al. 2017, "batch hard")

    Anchors without a positive or without a negative are skipped; if all are skipped, the loss is a differentiable
    zero. After a call, `stats` holds `anchors_without_triplet` (a count) and `active_fraction` (the share of
    triplets with a loss above zero), over all ranks.
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
        """features [B, V, D] or [N, D], labels [B] or [N] -> 0-dim loss. Raises LossInputError.

        Without labels, the positives of a row are the other views of its image. `generator` draws this rank's
        random positives and negatives; None: torch's global generator. `rows_per_rank`: see `pairwise_stats`.
        """
        anchors = prepare_anchors(
            features, labels, gather=self.gather, validate=self.validate, rows_per_rank=rows_per_rank
        )
        with torch.autocast(features.device.type, enabled=False):
            own = anchors.rows if features.dtype == torch.float64 else anchors.rows.float()
            rows, row_labels = own, anchors.labels
            if len(anchors.rows_per_rank) > 1:
                rows = collectives.gather_rows_with_grad(own, anchors.rows_per_rank)
                row_labels = collectives.gather_rows(anchors.labels, anchors.rows_per_rank)
            positive, negative, valid = _sample(row_labels, anchors.offset, len(own), generator)
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
    """For each of the rows offset .. offset + n, a random positive and a random negative; and which rows have both.

    Sorted by class, the rows of a class are one interval. A positive is drawn as an index into the interval, counted
    from the anchor on, and a negative as an index into the rest, counted from the interval's end on. This takes O(N)
    memory, where masks would take O(N^2).
    """
    total = len(labels)
    order = labels.argsort(stable=True)
    ids = consecutive_ids(labels)
    position = torch.empty_like(order).index_copy_(0, order, torch.arange(total, device=labels.device))
    members = torch.zeros_like(ids).index_add_(0, ids, torch.ones_like(ids))
    first = members.cumsum(0) - members
    own = slice(offset, offset + n)
    start, size, position_in_order = first[ids[own]], members[ids[own]], position[own]
    device = labels.device if generator is None else generator.device
    draw = torch.rand(2, n, generator=generator, device=device, dtype=torch.float64).to(labels.device)
    # Rows without a positive or a negative get an arbitrary index, and `valid` excludes them.
    step = 1 + (draw[0] * (size - 1)).long()
    positive = start + (position_in_order - start + step) % size.clamp(min=1)
    negative = (start + size + (draw[1] * (total - size)).long()) % max(total, 1)
    valid = (size > 1) & (size < total)
    return order[positive], order[negative], valid


def _mine(
    mining: str, own: Tensor, rows: Tensor, own_labels: Tensor, labels: Tensor, offset: int, positive: Tensor
) -> tuple[Tensor, Tensor]:
    """Indices of the positive and negative of every own row by "semihard" or "hard" mining; arbitrary where there is
    none. `positive`: the random positives."""
    pairs = []
    for start in range(0, len(own), _CHUNK):
        chunk = slice(start, min(start + _CHUNK, len(own)))
        distance = torch.cdist(own[chunk], rows, compute_mode="donot_use_mm_for_euclid_dist")
        same = own_labels[chunk, None] == labels[None, :]
        nearest_negative = distance.masked_fill(same, float("inf")).argmin(1)
        if mining == "hard":
            # The anchor is no positive of itself, even where all its positives are at distance zero too.
            itself = torch.arange(chunk.start + offset, chunk.stop + offset, device=own.device)
            candidates = distance.masked_fill(~same, -1.0).scatter_(1, itself[:, None], -1.0)
            pairs.append((candidates.argmax(1), nearest_negative))
            continue
        to_positive = distance.gather(1, positive[chunk, None])
        farther = distance.masked_fill(same | (distance <= to_positive), float("inf"))
        farthest_negative = distance.masked_fill(same, -1.0).argmax(1)
        has_farther = torch.isfinite(farther).any(1)
        pairs.append((positive[chunk], torch.where(has_farther, farther.argmin(1), farthest_negative)))
    if not pairs:
        return positive, positive
    first, second = zip(*pairs, strict=True)
    return torch.cat(first), torch.cat(second)
