"""What is trained and how: sections `model`, `loss`, `optim`, `train`, `checkpoint`, `log`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Count, NonNegative, Positive, Probability, Section


class ModelConfig(Section):
    encoder: str = Field(
        description="conv | resnet9 | resnet9_small | vgg16_bn_embed, or any name in timm.list_models()"
    )
    stem: Literal["auto", "small", "standard"] = Field(
        description="small: 3x3 stride 1 without max-pool, for inputs up to 64 px; auto chooses by image size"
    )
    input_size: Count | None = Field(
        description="resize the images to this inside the encoder, for encoders that need larger ones; null: never",
        json_schema_extra={"unit": "px"},
    )
    weights: str | None = Field(
        description="initial encoder weights: a file of timm, torchvision, SupContrast, solo-learn or MoCo; "
        "null: random"
    )
    out_dim: Count | None = Field(description="size of the features; null is the encoder's own")
    projection_hidden: Count = Field(description="width of the projection's hidden layer")
    projection_dim: Count = Field(description="size of the embeddings the loss sees")
    momentum_encoder: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        description="the queue's keys come from a copy of the model that follows with this momentum (MoCo: 0.999); "
        "null: from the model itself"
    )
    sync_bn: bool = Field(description="BatchNorm statistics over all ranks (with more than one rank)")


class LossConfig(Section):
    name: str = Field(
        description="supcon_out | supcon_in | tcl | simclr | triplet | cross_entropy | cross_entropy_mae | "
        "reconstruction"
    )
    temperature: Positive = Field(description="tau: similarities are divided by it (contrastive losses)")
    learnable_temperature: bool = Field(description="train tau along, from `temperature` on (contrastive losses)")
    base_temperature: Positive | None = Field(
        description="multiply the loss by temperature / this; null: no factor (SupContrast's default is 0.07)"
    )
    k1: NonNegative = Field(description="tcl: weight of the positives' repulsion term")
    k2: NonNegative = Field(description="tcl: weight of the negatives")
    margin: NonNegative = Field(description="triplet: squared distance by which negatives must be farther")
    mining: Literal["random", "semihard", "hard"] = Field(description="triplet: how positive and negative are chosen")
    squared: bool = Field(description="triplet: squared Euclidean distance (else the distance itself)")
    alpha: Probability = Field(description="reconstruction: alpha x MSE + (1 - alpha) x MAE")
    queue_size: Annotated[int, Field(ge=0)] = Field(
        description="past embeddings kept as extra columns of a contrastive loss; 0: none",
        json_schema_extra={"unit": "images"},
    )
    backend: str = Field(description="auto | reference | tiled | triton: how the similarity matrix is walked")


class OptimConfig(Section):
    name: Literal["sgd", "adamw"] = Field(description="optimiser")
    lr: Positive = Field(description="peak learning rate, used as written")
    lr_per_256: Positive | None = Field(
        description="when set, replaces lr by this times data.batch_size / 256 (and the log says so)"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(description="SGD momentum (AdamW: beta 1)")
    nesterov: bool = Field(description="Nesterov momentum (SGD)")
    weight_decay: NonNegative = Field(description="weight decay; norms and biases have none")
    schedule: Literal["cosine", "constant"] = Field(description="learning rate after the warm-up")
    warmup_epochs: NonNegative = Field(description="linear warm-up", json_schema_extra={"unit": "epochs"})
    final_lr_fraction: Probability = Field(description="cosine ends at this share of the peak")


class TrainConfig(Section):
    epochs: Count = Field(description="passes over the training split", json_schema_extra={"unit": "epochs"})
    precision: Literal["auto", "bf16", "fp32"] = Field(
        description="auto: bf16 autocast where the device computes in bf16; the loss is always fp32"
    )
    micro_batch_size: Count | None = Field(
        description="two-pass step: images per piece and rank, for a contrastive batch beyond memory; null: one pass",
        json_schema_extra={"unit": "images"},
    )
    channels_last: bool = Field(description="NHWC memory layout (faster convolutions)")


class CheckpointConfig(Section):
    every_epochs: Count | None = Field(
        description="save after every n-th epoch", json_schema_extra={"unit": "epochs"}
    )
    every_steps: Count | None = Field(description="save after every n-th step", json_schema_extra={"unit": "steps"})
    keep: Annotated[int, Field(ge=2)] = Field(description="newest checkpoints kept")


class LogConfig(Section):
    every_steps: Count = Field(
        description="steps between two lines of metrics.jsonl", json_schema_extra={"unit": "steps"}
    )
    gradient_response: bool = Field(
        description="log how strongly positives pull and negatives push (supcon_out, tcl); costs two more walks"
    )
    tensorboard: bool = Field(description="write TensorBoard events as well")
    progress: bool = Field(description="show a progress bar (rank 0, on a terminal)")
