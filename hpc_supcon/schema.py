"""The configuration schema: every setting, its type, range, unit and meaning.

Values carry no defaults here: configs/default.yaml is the one place that has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    # strict: "5" is no number and 1 is no boolean; validated from JSON, where a list may be a tuple
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SyntheticConfig(_Section):
    images: Count = Field(description="training images made", json_schema_extra={"unit": "images"})
    classes: Annotated[int, Field(ge=2)] = Field(description="classes made")
    channels: Literal[1, 3] = Field(description="1 is grey, 3 is RGB")
    image_size: Count = Field(description="side of the square images", json_schema_extra={"unit": "px"})


class DataConfig(_Section):
    source: str = Field(description="digits | mnist | fashion_mnist | cifar10 | cifar100 | image_folder | synthetic")
    root: str | None = Field(description="folder that holds the data set (digits and synthetic need none)")
    download: bool = Field(description="fetch a missing torchvision data set into data.root")
    image_size: Count | None = Field(
        description="resize the shorter side to this and crop the centre; null keeps the images' own size",
        json_schema_extra={"unit": "px"},
    )
    channels: Literal[1, 3] | None = Field(
        description="convert every image to 1 (grey) or 3 (RGB) channels; null demands that all agree"
    )
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="share of train carved off, stratified, where the data set has no validation split"
    )
    batch_size: Annotated[int, Field(ge=2)] = Field(
        description="GLOBAL number of images per optimiser step, over all ranks, before views",
        json_schema_extra={"unit": "images"},
    )
    views: Count = Field(description="augmented views of each image in a batch")
    sampler: str = Field(
        description="random | class_balanced (classes_per_batch x images_per_class) | long_tail_aware: which images "
        "share a batch"
    )
    classes_per_batch: Count | None = Field(description="class_balanced: different classes in every global batch")
    images_per_class: Count | None = Field(
        description="class_balanced: images of each of them; times classes_per_batch it is batch_size",
        json_schema_extra={"unit": "images"},
    )
    long_tail_alpha: Probability = Field(
        description="long_tail_aware: a class is drawn with probability ~ (its images) ** this; "
        "0 is balanced, 1 is as in the data"
    )
    beton: str | None = Field(
        description="read the images from these .beton files (made of data.source by `hpc-supcon convert`)"
    )
    loader: str = Field(
        description="auto | resident (the whole set as uint8 on the device) | torch (worker processes) | ffcv "
        "(.beton files) | dali"
    )
    workers: Count = Field(description="processes or threads that decode, per rank")
    timeout_s: Positive = Field(description="longest wait for one batch", json_schema_extra={"unit": "s"})
    on_corrupt: Literal["fail", "replace"] = Field(
        description="an image that does not decode: stop, or serve another one in its place and count it"
    )
    crop_while_decoding: bool = Field(
        description="the loader takes the random crops from the stored images, at full resolution (for large images)"
    )
    synthetic: SyntheticConfig = Field(description="what `source: synthetic` makes")


class RandAugmentConfig(_Section):
    operations: Annotated[int, Field(ge=0)] = Field(description="operations on each view, one after the other")
    magnitude: Annotated[int, Field(ge=0, le=30)] = Field(description="strength of every operation, 0..30")


class AugmentConfig(_Section):
    policy: str = Field(
        description="none (resize alone) | flip_crop | simaugment (flip_crop, jitter, grey, blur) | autoaugment | "
        "randaugment (both after flip_crop)"
    )
    crop_scale: tuple[Positive, Positive] = Field(description="range of the crop's share of the image area")
    crop_ratio: tuple[Positive, Positive] = Field(description="range of the crop's width / height")
    flip: Probability = Field(description="probability of a horizontal flip")
    brightness: NonNegative = Field(description="simaugment: factor drawn from 1 -+ this")
    contrast: NonNegative = Field(description="simaugment: factor drawn from 1 -+ this")
    saturation: NonNegative = Field(description="simaugment: factor drawn from 1 -+ this")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(
        description="simaugment: shift drawn from -+ this", json_schema_extra={"unit": "turns"}
    )
    jitter_probability: Probability = Field(description="simaugment: probability that a view is colour-jittered")
    grey: Probability = Field(description="simaugment: probability that a view loses its colour")
    blur: Probability = Field(
        description="simaugment: probability of a gaussian blur, sigma 0.1..2 px, kernel a tenth of the image"
    )
    autoaugment: str = Field(description="autoaugment: cifar10 | imagenet | svhn, the policy learned on that set")
    randaugment: RandAugmentConfig = Field(description="randaugment: how many operations, how strong")

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: {low} is above {high}; give [low, high]")
        if self.crop_scale[1] > 1:
            raise ValueError("crop_scale: a crop cannot be larger than the image (at most 1.0)")
        return self


class ModelConfig(_Section):
    encoder: str = Field(description="name of the encoder (see the error for an unknown one)")
    stem: Literal["auto", "small", "standard"] = Field(
        description="small: 3x3 stride 1 without max-pool, for inputs up to 64 px; auto chooses by image size"
    )
    out_dim: Count | None = Field(description="size of the features; null is the encoder's own")
    projection_hidden: Count = Field(description="width of the projection's hidden layer")
    projection_dim: Count = Field(description="size of the embeddings the loss sees")
    momentum_encoder: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        description="the queue's keys come from a copy of the model that follows with this momentum (MoCo: 0.999); "
        "null: from the model itself"
    )
    sync_bn: bool = Field(description="BatchNorm statistics over all ranks (with more than one rank)")


class LossConfig(_Section):
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


class OptimConfig(_Section):
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


class TrainConfig(_Section):
    epochs: Count = Field(description="passes over the training split", json_schema_extra={"unit": "epochs"})
    precision: Literal["auto", "bf16", "fp32"] = Field(
        description="auto: bf16 autocast where the device computes in bf16; the loss is always fp32"
    )
    micro_batch_size: Count | None = Field(
        description="two-pass step: images per piece and rank, for a contrastive batch beyond memory; null: one pass",
        json_schema_extra={"unit": "images"},
    )
    channels_last: bool = Field(description="NHWC memory layout (faster convolutions)")


class CheckpointConfig(_Section):
    every_epochs: Count | None = Field(
        description="save after every n-th epoch", json_schema_extra={"unit": "epochs"}
    )
    every_steps: Count | None = Field(description="save after every n-th step", json_schema_extra={"unit": "steps"})
    keep: Annotated[int, Field(ge=2)] = Field(description="newest checkpoints kept")


class LogConfig(_Section):
    every_steps: Count = Field(
        description="steps between two lines of metrics.jsonl", json_schema_extra={"unit": "steps"}
    )
    gradient_response: bool = Field(
        description="log how strongly positives pull and negatives push (supcon_out, tcl); costs two more walks"
    )
    tensorboard: bool = Field(description="write TensorBoard events as well")
    progress: bool = Field(description="show a progress bar (rank 0, on a terminal)")


class ProbeConfig(_Section):
    kind: Literal["linear"] = Field(description="classifier on the frozen features")
    epochs: Count = Field(description="passes over the cached features", json_schema_extra={"unit": "epochs"})
    batch_size: Count = Field(description="features per step", json_schema_extra={"unit": "images"})
    optimiser: Literal["adamw", "sgd"] = Field(description="optimiser of the head")
    lrs: tuple[Positive, ...] = Field(
        min_length=1, description="learning rates trained at once; validation accuracy chooses"
    )
    weight_decay: NonNegative = Field(description="weight decay of the head")
    standardise: bool = Field(description="give features zero mean and unit variance (over train) first")


class RuntimeConfig(_Section):
    device: Literal["auto", "cpu", "cuda"] = Field(description="auto: CUDA where there is one")
    threads: Count | None = Field(description="CPU threads per rank; null shares the machine's cores")
    timeout_s: Positive = Field(description="longest wait for another rank", json_schema_extra={"unit": "s"})


class Config(_Section):
    """A whole run. Field meanings: `hpc-supcon config --schema`."""

    name: str = Field(min_length=1, description="name of the run; also its folder when run_dir is null")
    run_dir: str | None = Field(description="run folder; null is runs/NAME")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(description="every random choice follows from it")
    deterministic: bool = Field(description="only deterministic algorithms: bit-identical repeats, slower on CUDA")
    data: DataConfig
    augment: AugmentConfig
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    probe: ProbeConfig
    runtime: RuntimeConfig

    @property
    def folder(self) -> Path:
        return Path(self.run_dir) if self.run_dir is not None else Path("runs") / self.name
