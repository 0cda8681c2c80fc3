"""Every closed set of names, as a Literal. Tests compare each one with the registry whose keys it repeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from ... import parts


@dataclass(frozen=True)
class Own:
    """Accepts the name of a part that is not of this package: an import path, or a name that an installed package has
    registered. Whether it can be imported is checked later."""

    kind: parts.Kind

    def __call__(self, name: str) -> str:
        if not parts.is_path(name) and name not in parts.registered(self.kind):
            raise ValueError("neither an import path, package.module:name, nor a registered name")
        return name


OwnSource = Annotated[str, AfterValidator(Own("sources"))]
OwnLoss = Annotated[str, AfterValidator(Own("losses"))]
OwnPolicy = Annotated[str, AfterValidator(Own("policies"))]
OwnProbe = Annotated[str, AfterValidator(Own("probes"))]
OwnLogger = Annotated[str, AfterValidator(Own("loggers"))]

OwnSourceName = Literal["image_folder", "manifest", "huggingface", "webdataset"]
"""Sources of whatever images a user has at data.root, with labels or without."""
SourceName = Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", OwnSourceName, "synthetic"]
SamplerName = Literal["random", "class_balanced", "long_tail_aware"]
LoaderName = Literal["auto", "resident", "torch", "ffcv", "dali"]
PolicyName = Literal["none", "flip_crop", "pad_crop", "simaugment", "autoaugment", "randaugment"]
CropName = Literal["global", "local"]
"""Kinds of views where they have two sizes."""
AutoAugmentName = Literal["cifar10", "imagenet", "svhn"]

OwnEncoderName = Literal["conv", "resnet9", "resnet9_small", "vgg16_bn_embed"]
"""Encoders of this package; every other name is timm's."""
ProjectionNormName = Literal["none", "hidden", "all"]
ActivationName = Literal["relu", "gelu"]
StemName = Literal["auto", "small", "standard"]

ContrastiveName = Literal["supcon_out", "supcon_in", "tcl", "simclr"]
"""Losses over the embeddings of all ranks, and of a queue."""
OfViewsName = Literal["barlow_twins", "vicreg", "simsiam", "byol", "moco_v2", "swav", "dino"]
"""Losses that compare the views of images, without labels, and shape a projection of their own."""
MultiCropName = Literal["swav", "dino"]
"""Those that take views of two sizes."""
PredictorName = Literal["simsiam", "byol"]
"""Those that train a predictor."""
TargetName = Literal["byol", "moco_v2", "dino"]
"""Those that aim at the embeddings of a momentum target."""
PairwiseName = Literal[ContrastiveName, OfViewsName, "triplet"]
"""Losses that compare images or views; all others take one image at a time."""
ClassifierLossName = Literal["cross_entropy", "cross_entropy_mae"]
"""Losses that train a classifier beside the encoder."""
DecoderLossName = Literal["reconstruction"]
"""Losses that train a decoder beside the encoder."""
LossName = Literal[PairwiseName, ClassifierLossName, DecoderLossName]
ResponseLossName = Literal["supcon_out", "tcl"]
"""Losses that `log.gradient_response` is defined for."""
MiningName = Literal["random", "semihard", "hard"]
KeysName = Literal["batch", "momentum"]
BackendName = Literal["auto", "reference", "tiled", "triton"]
LossPrecisionName = Literal["auto", "bf16", "tf32", "fp32"]

OptimizerName = Literal["sgd", "adamw", "lars", "lamb"]
ScheduleName = Literal["cosine", "step", "constant", "one_cycle"]
EngineName = Literal["ddp", "deepspeed"]
OnlineProbeName = Literal["none", "knn", "linear"]

ProbeName = Literal["linear", "softmax", "logistic", "mlp", "knn", "finetune"]
PixelProbeName = Literal["softmax", "logistic"]
"""Probes that read pixels where their setting `input` is `auto`."""
ProbeOptimizerName = Literal["adam", "adamw", "sgd"]

BenchmarkCorruptionName = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
]
"""Corruptions of the mean corruption error, which `all` stands for."""
ExtraCorruptionName = Literal["speckle_noise", "gaussian_blur", "saturate"]
CorruptionName = Literal[BenchmarkCorruptionName, ExtraCorruptionName]

SpaceName = Literal["pixels", "encoder", "projection"]
"""Where the images of a map are points."""
MapMethodName = Literal["pca", "tsne", "umap"]

WeightPruningName = Literal["l1", "random", "l1_weighted", "lamp"]
"""Pruning methods that need nothing but the weights."""
FisherPruningName = Literal["obs_diag", "obs_block", "fishleg"]
"""Pruning methods that need a likelihood."""
PruningMethodName = Literal[WeightPruningName, "layer_sensitive", FisherPruningName, "channels"]
ChannelScoreName = Literal["l1", "taylor"]
SparseValuesName = Literal["same", "fp16", "int8"]
PruningScopeName = Literal["global", "layer"]
"""Scopes besides the patterns N:M."""
PruningScheduleName = Literal["oneshot", "iterative", "gradual"]
PruningLossName = Literal["run", "cross_entropy"]

TrackerName = Literal["wandb", "mlflow"]
LoggerName = Literal["tensorboard", "csv", TrackerName]
ArtifactName = Literal["page", "pictures", "checkpoints"]
