"""The formula that all contrastive losses of this package are cases of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .pairwise import PairwiseStats


@dataclass(frozen=True)
class Formula:
    """The loss of one anchor, from the sums of autograd.RowSums:

        log(exp_pos + k1 inv_pos + k2 exp_neg) - sim_pos / |P|             inside: - log(exp_pos / |P|)

    k1 = 0, k2 = 1 is SupCon. triton_formula computes it in one kernel, `per_anchor` is what it means.
    """

    k1: float = 0.0
    k2: float = 1.0
    inside: bool = False

    @property
    def inverse(self) -> bool:
        """Whether inv_pos is needed."""
        return self.k1 > 0

    def per_anchor(self, stats: PairwiseStats) -> Tensor:
        """[n]; without meaning for anchors without positives."""
        if self.inside:
            return self._log_denominator(stats) - stats.log_pos + stats.n_pos.clamp(min=1).log()
        return self._log_denominator(stats) - stats.mean_pos

    def _log_denominator(self, stats: PairwiseStats) -> Tensor:
        if self.k1 == 0 and self.k2 == 1:
            return torch.logaddexp(stats.log_pos, stats.log_neg)
        # Terms with weight zero are left out: log 0 is not a number to add.
        terms = [stats.log_pos]
        if self.k2 > 0:
            terms.append(stats.log_neg + math.log(self.k2))
        if self.k1 > 0:
            assert stats.log_inv is not None
            terms.append(stats.log_inv + math.log(self.k1))
        return torch.logsumexp(torch.stack(terms), dim=0)
