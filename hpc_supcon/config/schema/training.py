"""How it is trained: sections `loss`, `optim`, `train`, `validation`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from ... import parts
from .base import Count, Decay, NonNegative, Options, Positive, Probability, Section, StoppingConfig
from .names import (
    BackendName,
    EngineName,
    KeysName,
    LossName,
    LossPrecisionName,
    MiningName,
    OnlineProbeName,
    OptimizerName,
    OwnLoss,
    ScheduleName,
)


class LossConfig(Section):
    name: LossName | OwnLoss = Field(description="what is minimized")
    options: Options = Field(
        description="arguments of a loss of your own; of several in `terms`: loss -> its arguments; null: none"
    )
    terms: dict[LossName | OwnLoss, Positive] | None = Field(
        min_length=1,
        description="a weighted sum of losses in place of `name`, such as {supcon_out: 1.0, cross_entropy: 0.5}",
    )
    supervised: bool = Field(
        description="false: an image's views are its positives, whatever its label (contrastive losses, triplet)"
    )
    temperature: Positive = Field(
        description="tau: similarities are divided by it (contrastive losses, moco_v2, swav, dino's student)"
    )
    learnable_temperature: bool = Field(
        description="train tau as well, starting from `temperature`; it stays at or above 0.025, or 0.002 where it "
        "starts below 0.025 (contrastive losses)"
    )
    base_temperature: Positive | None = Field(
        description="multiply the loss by temperature / this; null: no factor (SupContrast's default is 0.07)"
    )
    k1: NonNegative = Field(description="tcl: weight of the positives' repulsion term")
    k2: NonNegative = Field(description="tcl: weight of the negatives")
    margin: NonNegative = Field(description="triplet: squared distance by which negatives must be farther")
    mining: MiningName = Field(description="triplet: how positive and negative are chosen")
    squared: bool = Field(description="triplet: squared Euclidean distance (else the distance itself)")
    alpha: Probability = Field(description="reconstruction: alpha x MSE + (1 - alpha) x MAE")
    redundancy_weight: NonNegative = Field(
        description="barlow_twins: lambda, the weight of the correlations between different dimensions"
    )
    invariance_weight: NonNegative = Field(description="vicreg: lambda, the weight of the distance of views")
    variance_weight: NonNegative = Field(description="vicreg: mu, the weight of the variance of each dimension")
    covariance_weight: NonNegative = Field(description="vicreg: nu, the weight of the covariances of dimensions")
    prototypes: Count = Field(
        description="swav, dino: number of prototypes that embeddings are assigned to (dino: 65536)"
    )
    frozen_epochs: NonNegative = Field(
        description="swav, dino: prototypes keep their first values for so long", json_schema_extra={"unit": "epochs"}
    )
    sinkhorn_epsilon: Annotated[float, Field(ge=0.005)] = Field(
        description="swav: how soft assignments are; cosines are divided by it"
    )
    sinkhorn_iterations: Count = Field(description="swav: rounds in which the prototypes' shares are made equal")
    teacher_temperature: Positive = Field(description="dino: tau of the teacher, after its warm-up")
    teacher_warmup_temperature: Positive = Field(description="dino: tau of the teacher in the first epoch")
    teacher_warmup_epochs: Annotated[int, Field(ge=0)] = Field(
        description="dino: the teacher's tau rises for so long; 0: it is teacher_temperature from the start",
        json_schema_extra={"unit": "epochs"},
    )
    center_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="dino: momentum of the center, a moving average of the teacher's mean scores"
    )
    queue_size: Annotated[int, Field(ge=0)] = Field(
        description="past embeddings kept as extra columns of a contrastive loss, as moco_v2's negatives, or to "
        "share swav's prototypes with the batch; 0: none",
        json_schema_extra={"unit": "images"},
    )
    keys: KeysName = Field(
        description="what the views of a batch are compared with in a contrastive loss with a queue; batch: each "
        "other; momentum: the keys that model.momentum_encoder makes of them, positives included (MoCo)"
    )
    queue_start_epoch: Annotated[int, Field(ge=0)] = Field(
        description="swav: the queue, which is filled from the start, is used from this epoch on, once it is full",
        json_schema_extra={"unit": "epochs"},
    )
    backend: BackendName = Field(
        description="how contrastive losses compute similarities; reference: the whole matrix; tiled: one tile at a "
        "time; triton: the same by kernels for CUDA; auto: the fastest one that fits"
    )
    precision: LossPrecisionName = Field(
        description="products of embeddings in contrastive losses; bf16, tf32: formats of the triton backend; fp32: "
        "exact, by the other backends; auto: bf16 where training computes in bf16 or fp16, else tf32; sums are fp32"
    )

    @property
    def weights(self) -> dict[str, float]:
        """Loss -> its weight in what is minimized."""
        return {self.name: 1.0} if self.terms is None else dict[str, float](self.terms.items())

    @property
    def own(self) -> list[str]:
        """The losses that are not of this package."""
        return [name for name in self.weights if name not in get_args(LossName)]

    def options_of(self, name: str) -> Mapping[str, Any]:
        """The arguments of a loss of a user's own. Raises PartError."""
        return parts.options_of(name, self.own, self.options, "loss.options")

    @property
    def label(self) -> str:
        """What is minimized, for people: "supcon_out", or "supcon_out + 0.5 cross_entropy"."""
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in self.weights.items())


class OptimConfig(Section):
    name: OptimizerName = Field(description="optimizer")
    lr: Positive = Field(description="peak learning rate, used as written")
    lr_per_256: Positive | None = Field(
        description="when set, replaces lr by this times data.batch_size / 256 (and the log says so)"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="momentum of sgd and lars; beta 1 of adamw and lamb"
    )
    nesterov: bool = Field(description="Nesterov momentum (sgd, lars)")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(description="decay of the squared gradients (adamw, lamb)")
    eps: Positive | None = Field(
        description="added to denominators; null is the optimizer's own (adamw 1e-8, lamb 1e-6, lars 0)"
    )
    lars_eta: Positive = Field(description="lars: trust coefficient, a step's size as a share of the weight's norm")
    lars_clip: bool = Field(
        description="lars: a weight's own learning rate is the smaller of the schedule's and the adapted one (LARC)"
    )
    lamb_norm_range: tuple[NonNegative, Positive] | None = Field(
        description="lamb: weight norms are clamped to this range in the trust ratio; null: taken as they are"
    )
    weight_decay: NonNegative = Field(description="weight decay of the parameters that `decay` names")
    decay: Decay
    clip_norm: Positive | None = Field(description="gradients are scaled down to this global norm; null: never")
    schedule: ScheduleName = Field(
        description="learning rate after the warm-up; one_cycle: its rising part is the warm-up"
    )
    warmup_epochs: NonNegative = Field(description="linear warm-up", json_schema_extra={"unit": "epochs"})
    warmup_iterations: Annotated[int, Field(ge=0)] = Field(
        description="linear warm-up, given in steps (then warmup_epochs is 0)", json_schema_extra={"unit": "steps"}
    )
    final_lr_fraction: Probability = Field(description="cosine and one_cycle end at this share of the peak")
    predictor_schedule: Literal["same", "constant"] = Field(
        description="simsiam, byol: the predictor's learning rate; same: as all others; constant: the peak in every "
        "step (SimSiam)"
    )
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        min_length=1, description="step: shares of the training after which the rate is multiplied by gamma"
    )
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(description="step: factor at each milestone")

    @model_validator(mode="after")
    def _optimizer_uses_its_settings(self) -> OptimConfig:
        if self.nesterov and (self.name not in ("sgd", "lars") or self.momentum == 0):
            raise ValueError("optim.nesterov is for sgd and lars with momentum above 0; use false")
        if self.eps is not None and self.name == "sgd":
            raise ValueError("optim.eps: sgd has no denominator to add it to; use null")
        if self.lamb_norm_range is not None and self.name != "lamb":
            raise ValueError(f"optim.lamb_norm_range is for lamb, not for {self.name}; use null")
        if self.lamb_norm_range is not None and self.lamb_norm_range[0] > self.lamb_norm_range[1]:
            raise ValueError(f"optim.lamb_norm_range={list(self.lamb_norm_range)}: the lower end comes first")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> OptimConfig:
        if self.warmup_epochs and self.warmup_iterations:
            raise ValueError(
                "optim.warmup_epochs and optim.warmup_iterations both give the length of the warm-up: set one to 0"
            )
        if self.schedule == "one_cycle" and not (self.warmup_epochs or self.warmup_iterations):
            raise ValueError(
                "optim.schedule=one_cycle rises in the warm-up: set optim.warmup_epochs (usual: 0.3 of train.epochs)"
            )
        if self.final_lr_fraction and self.schedule not in ("cosine", "one_cycle"):
            raise ValueError(f"optim.final_lr_fraction is where cosine and one_cycle end, not {self.schedule}; use 0")
        if any(a >= b for a, b in pairwise(self.milestones)):
            raise ValueError(f"optim.milestones={list(self.milestones)} must increase")
        return self


class DeepSpeedConfig(Section):
    zero: Literal[0, 1, 2] = Field(
        description="what is partitioned over ranks: nothing (0), the optimizer's state (1), gradients as well (2)"
    )
    config: dict[str, Any] | None = Field(
        description="DeepSpeed's own configuration, merged into ours; keys that other settings decide are refused"
    )


class TrainConfig(Section):
    engine: EngineName = Field(
        description="library that averages gradients and keeps the optimizer's state; a run may resume under another"
    )
    deepspeed: DeepSpeedConfig = Field(description="settings of engine=deepspeed")
    epochs: Count = Field(description="passes over the training split", json_schema_extra={"unit": "epochs"})
    iterations: Count | None = Field(
        description="optimizer steps; when set, replaces epochs", json_schema_extra={"unit": "steps"}
    )
    stopping: StoppingConfig = Field(description="early stopping; needs validation.every_epochs or every_steps")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        description="auto: bf16 autocast where the device computes in bf16; fp16 (CUDA): with loss scaling; weights, "
        "optimizer and loss are always fp32"
    )
    compile: bool = Field(description="torch.compile for the training forward and backward pass; takes minutes once")
    cuda_graphs: bool = Field(description="replay the compiled pass as CUDA graphs (CUDA, with compile)")
    activation_checkpointing: bool = Field(
        description="keep only the inputs of the encoder's blocks and recompute the rest: less memory, more time"
    )
    micro_batch_size: Count | None = Field(
        description="two-pass step: images per piece and rank, for a contrastive batch beyond memory; null: one pass",
        json_schema_extra={"unit": "images"},
    )
    channels_last: bool = Field(description="NHWC memory layout (faster convolutions)")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="evaluate an exponential moving average of the weights with this decay per step; null: the "
        "weights themselves"
    )
    profile: Count | None = Field(
        description="measure where the time of a step goes over this many steps, after 5 of warm-up, and write a "
        "profiler trace of 3 more into RUN_DIR/profile; null: never",
        json_schema_extra={"unit": "steps"},
    )
    gc_every_steps: Count | None = Field(
        description="collect Python's garbage after every n-th step, on all ranks at once; null: when Python does",
        json_schema_extra={"unit": "steps"},
    )
    allow_world_size_change: bool = Field(
        description="allow a resume on another number of ranks: batches stay the same, but random views differ, and "
        "results in their last bits; false: an error"
    )
    allow_code_change: bool = Field(
        description="resume although the file of a source, encoder, loss or policy of your own is not the one that "
        "the run was started with"
    )


class OnlineProbeConfig(Section):
    kind: OnlineProbeName = Field(
        description="log the validation accuracy of this probe, fitted on the features of the moment"
    )
    images: Count = Field(
        description="fit it on at most this many training images, evenly spaced",
        json_schema_extra={"unit": "images"},
    )
    k: Count = Field(description="knn: number of neighbors that vote")
    temperature: Positive = Field(description="knn: a neighbor's vote is exp(cosine / temperature)")


class ValidationConfig(Section):
    every_epochs: Count | None = Field(
        description="measure loss (and accuracy) on the validation split after every n-th epoch; null: never",
        json_schema_extra={"unit": "epochs"},
    )
    every_steps: Count | None = Field(
        description="the same after every n-th step", json_schema_extra={"unit": "steps"}
    )
    probe: OnlineProbeConfig = Field(description="a probe of the frozen features, at every validation")

    @property
    def enabled(self) -> bool:
        return self.every_epochs is not None or self.every_steps is not None
