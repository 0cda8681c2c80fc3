"""Evaluation: section `probe`, with one subsection for each kind of probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from ... import parts
from .base import Count, Decay, NonNegative, Options, Positive, Section, StoppingConfig
from .names import (
    BenchmarkCorruptionName,
    CorruptionName,
    OwnProbe,
    PixelProbeName,
    ProbeName,
    ProbeOptimizerName,
)

Input = Annotated[
    Literal["auto", "features", "pixels"],
    Field(
        description="what the classifier reads: the frozen encoder's features, or the normalized, flattened pixels; "
        "auto: pixels for softmax and logistic, features for the others"
    ),
]
TrainingInput = Annotated[
    Literal["auto", "features", "pixels", "images"],
    Field(
        description="what training reads: the frozen encoder's features, computed once; the normalized, flattened "
        "pixels; or images: the features of new random views (section augment) of every image in every epoch; auto: "
        "features"
    ),
]
Rate = Annotated[Positive, Field(description="learning rate at its peak")]


class FitConfig(Section):
    """What every trained classifier shares."""

    epochs: Count = Field(description="passes over the training split", json_schema_extra={"unit": "epochs"})
    iterations: Count | None = Field(
        description="optimizer steps, in place of epochs; null: as many as `epochs` has",
        json_schema_extra={"unit": "iterations"},
    )
    evaluate_every: Count | None = Field(
        description="iterations between two evaluations on the validation split; null: once per epoch",
        json_schema_extra={"unit": "iterations"},
    )
    batch_size: Count = Field(description="images per step, over all ranks", json_schema_extra={"unit": "images"})
    optimizer: ProbeOptimizerName = Field(description="optimizer (sgd: momentum 0.9)")
    weight_decay: NonNegative = Field(description="weight decay of the parameters that `decay` names")
    decay: Decay
    schedule: Literal["cosine", "constant"] = Field(description="cosine: learning rate falls to 0 at the last step")
    stopping: StoppingConfig


class LinearConfig(FitConfig):
    input: TrainingInput
    standardize: bool = Field(description="give inputs zero mean and unit variance (over train) first")
    lrs: tuple[Positive, ...] = Field(
        min_length=1, description="learning rates trained at once; the validation split chooses"
    )


class SoftmaxConfig(FitConfig):
    input: Input
    standardize: bool = Field(description="give inputs zero mean and unit variance (over train) first")
    lr: Rate
    l2_lambda: NonNegative = Field(description="l2_lambda x sum of squared weights (not biases) is added to the loss")
    clip_norm: Positive | None = Field(description="longest gradient, as an L2 norm; null: not clipped")


class LogisticConfig(SoftmaxConfig):
    classes: tuple[str | int, str | int] | None = Field(
        description="the two classes to tell apart: names, or indices from 0; null: the data has only two"
    )


class MlpConfig(FitConfig):
    input: TrainingInput
    standardize: bool = Field(description="give inputs zero mean and unit variance (over train) first")
    lr: Rate
    hidden: tuple[Count, ...] = Field(min_length=1, description="widths of the hidden layers")
    batch_norm: bool = Field(description="BatchNorm after each hidden layer")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(description="probability of dropping a hidden unit")


class KnnConfig(Section):
    input: Input
    k: Count = Field(description="nearest training images that vote", json_schema_extra={"unit": "images"})
    temperature: Positive = Field(description="a neighbor votes with exp(cosine similarity / temperature)")


class FinetuneConfig(FitConfig):
    lr: Rate
    encoder_lr: NonNegative = Field(description="learning rate of the encoder at its peak; 0 keeps its weights")
    augment: bool = Field(description="train on one random view of each image (section augment), else on the image")
    hidden: tuple[Count, ...] = Field(description="widths of hidden layers (with ReLU) before the last one; []: none")


class ProbeConfig(Section):
    kind: ProbeName | OwnProbe | tuple[ProbeName | OwnProbe, ...] = Field(
        description="the probe, or a list, evaluated in that order"
    )
    options: Options = Field(
        description="arguments of a probe of your own; of several in `kind`: probe -> its arguments; null: none"
    )
    corruptions: Literal["all"] | CorruptionName | tuple[CorruptionName, ...] = Field(
        description="corruptions of the test images, at five severities, under which every probe is evaluated too; "
        "all: those of ImageNet-C and CIFAR-10-C but for frost, without the extra ones; []: none"
    )
    corruption_images: Count | None = Field(
        description="test images that are corrupted, of every class in proportion to its size; null: all of them",
        json_schema_extra={"unit": "images"},
    )
    embedding: bool = Field(
        description="also score the test split's features without a classifier: alignment, uniformity, silhouette, "
        "k-means, effective rank, retrieval (scores.json, section embedding)"
    )
    ood: str | tuple[str, ...] = Field(
        description="the data set, or a list, that the encoder should tell from the run's own: SOURCE or SOURCE:PATH "
        "(as data.source and data.root; without PATH: data.root). AUROC and FPR95 of three detectors, on test splits"
    )
    transfer: str | tuple[str, ...] = Field(
        description="other labeled data sets, SOURCE or SOURCE:PATH as in ood, on which the probes of `kind` are "
        "fitted and evaluated too, in the size, channels and normalization of the encoder; filed under KIND@DATA"
    )
    linear: LinearConfig
    softmax: SoftmaxConfig
    logistic: LogisticConfig
    mlp: MlpConfig
    knn: KnnConfig
    finetune: FinetuneConfig

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.kind,) if isinstance(self.kind, str) else self.kind

    @property
    def own(self) -> list[str]:
        """The probes that are not of this package."""
        return [kind for kind in self.kinds if kind not in get_args(ProbeName)]

    def options_of(self, kind: str) -> Mapping[str, Any]:
        """The arguments of a probe of a user's own. Raises PartError."""
        return parts.options_of(kind, self.own, self.options, "probe.options")

    @property
    def corruption_names(self) -> tuple[CorruptionName, ...]:
        if self.corruptions == "all":
            return get_args(BenchmarkCorruptionName)
        return (self.corruptions,) if isinstance(self.corruptions, str) else self.corruptions

    def input_of(self, kind: str) -> Literal["features", "pixels", "images"]:
        """What the fitted probe `kind` reads; `images` for finetune, which trains the encoder."""
        if kind in self.own:
            return "features"
        if kind == "finetune":
            return "images"
        setting: Literal["auto", "features", "pixels", "images"] = getattr(self, kind).input
        if setting == "images":  # of which the frozen encoder computes the features
            return "features"
        if setting == "auto":
            return "pixels" if kind in get_args(PixelProbeName) else "features"
        return setting

    def trains_on_images(self, kind: str) -> bool:
        """Whether fitting the probe `kind` takes batches of images, shared by the ranks."""
        if kind in self.own:
            return False
        return kind == "finetune" or getattr(self, kind).input == "images"

    @property
    def ood_sets(self) -> list[tuple[str, str, str | None]]:
        """(its text, source, folder or None) of each data set of `ood`."""
        return _data_sets(self.ood)

    @property
    def transfer_sets(self) -> list[tuple[str, str, str | None]]:
        """As `ood_sets`, of `transfer`."""
        return _data_sets(self.transfer)

    @property
    def needs_encoder(self) -> bool:
        """Whether any of `kinds` reads more than pixels."""
        return any(self.input_of(kind) != "pixels" for kind in self.kinds)


def _data_sets(setting: str | tuple[str, ...]) -> list[tuple[str, str, str | None]]:
    texts = (setting,) if isinstance(setting, str) else setting
    parts = [(text, *text.partition(":")) for text in texts]
    return [(text, source, path if colon else None) for text, source, colon, path in parts]
