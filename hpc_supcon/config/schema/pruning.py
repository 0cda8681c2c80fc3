"""Pruning: section `prune`."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from ...errors import unknown_name
from .base import Count, NonNegative, Positive, Section
from .names import (
    ChannelScoreName,
    PruningLossName,
    PruningMethodName,
    PruningScheduleName,
    PruningScopeName,
    SparseValuesName,
    WeightPruningName,
)

PATTERN = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")
REWIND = re.compile(r"(epoch|step) ([1-9]\d{0,8})")


class PruneFinetuneConfig(Section):
    loss: PruningLossName = Field(
        description="run: the run's own loss; cross_entropy: of a classifier on the features, which starts as the "
        "linear probe of `probe.linear`"
    )
    between: bool = Field(description="iterative: fine-tune after every round; false: after the last one only")
    epochs: Annotated[int, Field(ge=0)] = Field(
        description="passes over the training split after pruning, by the run's own optimizer, pruned weights kept "
        "at zero; 0: none",
        json_schema_extra={"unit": "epochs"},
    )
    iterations: Count | None = Field(
        description="optimizer steps; when set, replaces epochs", json_schema_extra={"unit": "steps"}
    )
    lr: Positive | None = Field(
        description="peak learning rate, used as written; null: a tenth of the pre-training's peak, with `rewind` "
        "the whole peak"
    )
    schedule: Literal["cosine", "constant"] = Field(description="cosine: learning rate falls to 0 at the last step")
    warmup_epochs: NonNegative = Field(description="linear warm-up", json_schema_extra={"unit": "epochs"})


class ScanConfig(Section):
    rates: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        min_length=1, description="layer_sensitive: shares at which each layer is pruned by itself"
    )
    images: Count | None = Field(
        description="layer_sensitive: images of the validation split that are used, evenly strided; null: all",
        json_schema_extra={"unit": "images"},
    )


class ChannelsConfig(Section):
    score: ChannelScoreName = Field(
        description="channels: those go first whose weights have the smallest sum of |w| (relative to the layer's "
        "mean), or of |w x gradient of `prune.loss`|, the first-order Taylor expansion of the loss"
    )
    batches: Count = Field(
        description="taylor: global batches of the training split whose gradients are taken",
        json_schema_extra={"unit": "batches"},
    )


class LatencyConfig(Section):
    batch_sizes: tuple[Count, ...] = Field(
        description="channels, and scope 2:4 on CUDA: images per forward pass of dense and pruned encoder, which are "
        "timed in turn on this device; []: not timed",
        json_schema_extra={"unit": "images"},
    )
    seconds: Positive = Field(
        description="time for each batch size and encoder; a batch size is left out where one pass takes longer",
        json_schema_extra={"unit": "s"},
    )


class FisherConfig(Section):
    kind: Literal["model", "empirical"] = Field(
        description="model: the Fisher information, with targets of the model's own predictions; empirical: with the "
        "labels, which is not it where the model fits them"
    )
    damping: Positive | None = Field(
        description="added to the diagonal; null: the mean of the diagonal, of obs_block a hundredth of it"
    )
    steps: Annotated[int, Field(ge=0)] = Field(
        description="fishleg: steps of learning the inverse, each about 4 forward and backward passes of a batch of "
        "training; half of them in later rounds of schedule=iterative; 0: its start alone, from 32 batches",
        json_schema_extra={"unit": "steps"},
    )
    lr: Positive = Field(description="fishleg: about the relative change of the inverse in one step, falling to 0")
    largest_factor: Count = Field(
        description="fishleg: side of the largest block of a layer's two factors, of which each takes at most "
        "12 x this bytes for each input (times kernel) and output"
    )
    joint: bool = Field(
        description="fishleg: compensate for all removed weights together; false: add the compensations for each "
        "alone, as published"
    )
    samples: Count = Field(
        description="obs: views of the training split whose single gradients are used, in all",
        json_schema_extra={"unit": "views"},
    )
    batches: Count = Field(
        description="obs, for a contrastive loss, whose rows depend on each other: batches whose gradients are used",
        json_schema_extra={"unit": "batches"},
    )
    block: Count = Field(description="obs_block: weights of one output in a block; takes 4 x this bytes per weight")


class PruneConfig(Section):
    method: PruningMethodName = Field(
        description="which weights go first: the smallest |w|; at random; the smallest |w| / norm of the layer's "
        "weights; the smallest w^2 / sum of the layer's squares that are not smaller (Lee et al. 2021); the smallest "
        "|w|, at rates of the layers that a scan of the loss on validation predicts to be the best; obs_*, fishleg: "
        "what `fisher` estimates that the removal costs, and but for obs_diag the weights that are left are changed "
        "to compensate; channels: whole output channels of convolutions, which leaves a smaller dense encoder"
    )
    rate: float | tuple[float, ...] = Field(
        description="share of the encoder's convolution and linear weights to prune, 0 to below 1, those counted "
        "that are pruned already; or a list of shares, each pruned from the dense encoder (iterative: each from the "
        "one before). Not used with scope N:M. channels: share of the channels that can be removed"
    )
    scope: str = Field(
        description="global: `rate` is the share of all these weights together; layer: of the weights of each layer; "
        "N:M such as 2:4: N of every M weights along the input channels are kept, in layers whose number of input "
        "channels M divides"
    )
    schedule: PruningScheduleName = Field(
        description="at once; in rounds of pruning and fine-tuning; or while fine-tuning, by a cubic ramp (Zhu & "
        "Gupta 2017)"
    )
    steps: Count = Field(
        description="iterative: rounds up to a single `rate`, each pruning the same share of what is left; gradual: "
        "how often to prune during fine-tuning"
    )
    interval: Count | None = Field(
        description="gradual: optimizer steps from one pruning to the next; null: the ramp takes half of the "
        "fine-tuning",
        json_schema_extra={"unit": "steps"},
    )
    rewind: str | None = Field(
        description="values of the weights that are left, before fine-tuning: `initial`: those before training; "
        "`epoch N` or `step N`: those of that checkpoint of the run (see checkpoint.keep_every_steps); null: as they "
        "are"
    )
    loss: PruningLossName = Field(
        description="loss that methods with data measure; run: the run's own; cross_entropy: of a linear probe"
    )
    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = Field(
        description="added to the folder's name, RUN_DIR/pruned/METHOD-SCOPE-RATE-SCHEDULE-LABEL, to keep two "
        "prunings apart that differ in another setting; null: nothing"
    )
    values: SparseValuesName = Field(
        description="numbers in model.sparse.safetensors: as they are; in half precision; or in 8 bits with a scale "
        "for each tensor"
    )
    channels: ChannelsConfig
    latency: LatencyConfig
    fisher: FisherConfig
    scan: ScanConfig
    finetune: PruneFinetuneConfig

    @field_validator("rate")
    @classmethod
    def _is_a_share(cls, rate: float | tuple[float, ...]) -> float | tuple[float, ...]:
        rates = rate if isinstance(rate, tuple) else (rate,)
        if not rates:
            raise ValueError("prune.rate is an empty list: name one rate or more, such as [0.2, 0.5]")
        for one in rates:
            if not 0 <= one < 1:
                raise ValueError(f"prune.rate={one:g}: the share of weights to prune is 0 or more and below 1")
        return rate

    @field_validator("scope")
    @classmethod
    def _is_a_scope(cls, scope: str) -> str:
        found = PATTERN.fullmatch(scope)
        if found is not None and int(found[1]) >= int(found[2]):
            raise ValueError(f"prune.scope={scope}: N of every M weights are kept, so N must be below M")
        if found is None and scope not in get_args(PruningScopeName):
            names = get_args(PruningScopeName)
            raise ValueError(unknown_name("prune.scope", scope, names, listed="global, layer, N:M such as 2:4"))
        return scope

    @field_validator("rewind")
    @classmethod
    def _is_a_point_of_training(cls, rewind: str | None) -> str | None:
        if rewind is not None and rewind != "initial" and not REWIND.fullmatch(rewind):
            raise ValueError(
                f"prune.rewind={rewind}: must be null, initial, or `epoch N` or `step N` with N of 1 or more"
            )
        return rewind

    @property
    def rates(self) -> tuple[float, ...]:
        return self.rate if isinstance(self.rate, tuple) else (self.rate,)

    @property
    def rounds(self) -> tuple[float, ...]:
        """The rates in the order in which they are pruned: `rates`, or those of the rounds up to a single one.

        Each round prunes the same share of the weights that are left, 1 - (1 - rate)^(k / steps) in all after k of
        them (Frankle & Carbin 2019, arXiv 1803.03635, section 2), to four digits.
        """
        if self.schedule != "iterative" or isinstance(self.rate, tuple):
            return self.rates
        earlier = (round(1 - (1 - self.rate) ** (k / self.steps), 4) for k in range(1, self.steps))
        return (*earlier, self.rate)

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M) of a scope N:M, else None."""
        found = PATTERN.fullmatch(self.scope)
        return None if found is None else (int(found[1]), int(found[2]))

    @property
    def rewound_to(self) -> tuple[str, int] | None:
        """("epoch" or "step", N), ("initial", 0), or None."""
        if self.rewind is None or self.rewind == "initial":
            return None if self.rewind is None else ("initial", 0)
        found = REWIND.fullmatch(self.rewind)
        assert found is not None
        return found[1], int(found[2])

    @property
    def measures(self) -> bool:
        """Whether the method measures `loss`."""
        if self.method == "channels":
            return self.channels.score == "taylor"
        return self.method not in get_args(WeightPruningName)

    @property
    def fits_classifier(self) -> bool:
        """Whether a linear probe is fitted, for a cross-entropy that is measured or trained."""
        return (self.measures and self.loss == "cross_entropy") or (
            self.finetunes and self.finetune.loss == "cross_entropy"
        )

    @property
    def finetunes(self) -> bool:
        return self.finetune.epochs > 0 or self.finetune.iterations is not None
