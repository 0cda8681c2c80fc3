"""Supervised contrastive, tuned contrastive and SimCLR losses: formulas on the result of `pairwise_stats`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..errors import ConfigError, unknown_name
from .formula import Formula
from .pairwise import check_choices, prepare_call, statistics
from .temperature import at_least, check_temperature, least_temperature
from .validation import Queue

FORMS = ("out", "in")


class _AnchorMean(torch.autograd.Function):
    """pairwise.global_mean of per_anchor [n], and [4] float64 over all ranks: the sum of the valid per_anchor, and
    the numbers of valid anchors, of positive pairs and of anchors."""

    @staticmethod
    def forward(ctx: Any, per_anchor: Tensor, valid: Tensor, n_pos: Tensor, gather: bool) -> tuple[Tensor, Tensor]:
        rows = torch.stack([per_anchor.masked_fill(~valid, 0.0), valid, n_pos])
        sums = torch.nn.functional.pad(rows.sum(1, dtype=torch.float64), (0, 1), value=len(valid))
        ranks = collectives.world_size() if gather else 1
        if ranks > 1:
            sums = collectives.all_sum(sums)
        count = sums[1].clamp(min=1)
        ctx.save_for_backward(valid, count)
        ctx.ranks, ctx.dtype = ranks, per_anchor.dtype
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return (sums[0] / count).to(per_anchor.dtype), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        valid, count = ctx.saved_tensors
        share = (grads[0] * ctx.ranks / count).to(ctx.dtype)
        return valid * share, None, None, None


class _ContrastiveLoss(nn.Module):
    """Base of the contrastive losses: the temperature, and the mean over anchors of a formula.

    After a call, `stats` holds two 0-dim tensors over all ranks, computed without waiting for the device:
    `anchors_without_positives` (a count) and `mean_positives` (per anchor).
    """

    def __init__(
        self,
        temperature: float,
        backend: str,
        precision: str,
        gather: bool,
        validate: bool,
        learnable_temperature: bool,
    ) -> None:
        """`backend`, `precision`, `gather`, `validate`: see `pairwise_stats`.

        `learnable_temperature`: train the temperature, starting from `temperature`; it stays at or above 0.025,
        or 0.002 where it starts below 0.025.
        """
        super().__init__()
        check_choices(backend, precision)
        check_temperature(temperature)
        self.backend, self.precision = backend, precision
        self.gather, self.validate = gather, validate
        self._sums: Tensor | None = None
        self._temperature = temperature
        self.log_temperature: nn.Parameter | None = None
        if learnable_temperature:
            # The logarithm is the parameter, so no optimizer step can make the temperature negative.
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    @property
    def stats(self) -> dict[str, Tensor]:
        """Empty before the first call."""
        if self._sums is None:
            return {}
        _, valid, positives, anchors = self._sums.unbind()
        return {"anchors_without_positives": anchors - valid, "mean_positives": positives / anchors.clamp(min=1)}

    @property
    def temperature(self) -> float | Tensor:
        if self.log_temperature is None:
            return self._temperature
        return at_least(self.log_temperature.exp(), least_temperature(self._temperature))

    def _mean(
        self,
        features: Tensor,
        labels: Tensor | None,
        queue: Queue | None,
        keys: Tensor | None,
        rows_per_rank: list[int] | None,
        formula: Formula,
    ) -> Tensor:
        """The mean of the formula over the anchors of all ranks that have a positive."""
        temperature = self._temperature if self.log_temperature is None else self.log_temperature.exp()
        call = prepare_call(
            features,
            labels,
            temperature,
            backend=self.backend,
            gather=self.gather,
            queue=queue,
            keys=keys,
            validate=self.validate,
            precision=self.precision,
            rows_per_rank=rows_per_rank,
            least_temperature=least_temperature(self._temperature),
        )
        if call.backend == "triton":
            from .triton_loss import triton_mean_loss

            mean, self._sums = triton_mean_loss(call, formula)
            return mean
        stats = statistics(call, inverse=formula.inverse)
        mean, self._sums = _AnchorMean.apply(formula.per_anchor(stats), stats.valid, stats.n_pos, self.gather)
        # Low temperatures are computed in fp64; the loss is fp32 unless the features are fp64.
        return mean if features.dtype == torch.float64 else mean.float()


class SupConLoss(_ContrastiveLoss):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362): "out" is equation 2, "in" equation 3.

        out  log sum_{A(i)} exp(s_ij) - mean_{P(i)} s_ij
        in   log sum_{A(i)} exp(s_ij) - log mean_{P(i)} exp(s_ij)        s_ij = z_i . z_j / temperature

    with z the normalized features, P(i) the other rows of anchor i's class and A(i) all rows but i, averaged over
    the anchors of all ranks that have a positive. `base_temperature` multiplies the loss by
    temperature / base_temperature, as the authors' code does with 0.07; None is the paper's formula.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        form: str = "out",
        base_temperature: float | None = None,
        backend: str = "auto",
        *,
        precision: str = "auto",
        gather: bool = True,
        validate: bool = True,
        learnable_temperature: bool = False,
    ) -> None:
        """`backend`, `precision`, `gather`, `validate`: see `pairwise_stats`. Raises ConfigError."""
        super().__init__(temperature, backend, precision, gather, validate, learnable_temperature)
        if form not in FORMS:
            raise ConfigError(unknown_name("form of the SupCon loss", form, FORMS))
        if base_temperature is not None and not base_temperature > 0:
            raise ConfigError(f"base_temperature must be positive, or null for no factor; got {base_temperature}")
        self.form, self.base_temperature = form, base_temperature

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        queue: Queue | None = None,
        rows_per_rank: list[int] | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """features [B, V, D] or [N, D], labels [B] or [N] -> 0-dim loss. Raises LossInputError.

        Without labels, the positives of a row are the other views of its image. `queue`: past embeddings [Q, D] and
        their labels [Q], compared with every anchor but without gradient. `rows_per_rank`, `keys`: see
        `pairwise_stats`.
        """
        loss = self._mean(features, labels, queue, keys, rows_per_rank, Formula(inside=self.form == "in"))
        if self.base_temperature is None:
            return loss
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.detach()
        return loss * (temperature / self.base_temperature)


class TCLLoss(_ContrastiveLoss):
    """Tuned contrastive loss (Animesh and Chandraker 2023, arXiv 2305.10675, equation 8).

        log( sum_P exp(s_ij) + k1 sum_P exp(-z_i . z_j) + k2 sum_N exp(s_ij) ) - mean_P s_ij

    The k1 term has no temperature. k1 strengthens the gradient of hard positives, k2 that of hard negatives;
    k1 = 0, k2 = 1 is SupCon "out".
    """

    def __init__(
        self,
        temperature: float = 0.1,
        k1: float = 5000.0,
        k2: float = 1.0,
        backend: str = "auto",
        *,
        precision: str = "auto",
        gather: bool = True,
        validate: bool = True,
        learnable_temperature: bool = False,
    ) -> None:
        """`backend`, `precision`, `gather`, `validate`: see `pairwise_stats`. Raises ConfigError."""
        super().__init__(temperature, backend, precision, gather, validate, learnable_temperature)
        for name, value in (("k1", k1), ("k2", k2)):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be a finite number >= 0; got {value}")
        self.k1, self.k2 = k1, k2

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        queue: Queue | None = None,
        rows_per_rank: list[int] | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """As SupConLoss.forward."""
        return self._mean(features, labels, queue, keys, rows_per_rank, Formula(float(self.k1), float(self.k2)))


class SimCLRLoss(_ContrastiveLoss):
    """NT-Xent loss of SimCLR (Chen et al. 2020, equation 1): the positives of a view are its image's other views.

    Labels are accepted but not used, so that all contrastive losses are called the same way. Past embeddings
    of the queue are negatives, whatever their labels.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        backend: str = "auto",
        *,
        precision: str = "auto",
        gather: bool = True,
        validate: bool = True,
        learnable_temperature: bool = False,
    ) -> None:
        """`backend`, `precision`, `gather`, `validate`: see `pairwise_stats`. Raises ConfigError."""
        super().__init__(temperature, backend, precision, gather, validate, learnable_temperature)

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        queue: Queue | None = None,
        rows_per_rank: list[int] | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """features [B, V, D], V >= 2 -> 0-dim loss."""
        past = None if queue is None else (queue[0], None)
        return self._mean(features, None, past, keys, rows_per_rank, Formula())
