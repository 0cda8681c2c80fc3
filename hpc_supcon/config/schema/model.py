"""The encoder and its heads: section `model`."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from .base import Count, Options, Section
from .lora import LoraConfig
from .names import ActivationName, OwnEncoderName, ProjectionNormName, StemName


class ModelConfig(Section):
    encoder: str = Field(
        description=f"{' | '.join(get_args(OwnEncoderName))}, any name in timm.list_models(), or package.module:name"
    )
    options: Options = Field(
        description="arguments of an encoder of your own, besides in_channels, image_size and out_dim; null: none"
    )
    stem: StemName = Field(
        description="small: 3x3 stride 1 without max-pool, for inputs up to 64 px; auto: by the size of the images"
    )
    input_size: Count | None = Field(
        description="resize the images to this inside the encoder, for encoders that need larger ones; null: never",
        json_schema_extra={"unit": "px"},
    )
    weights: str | None = Field(
        description="initial encoder weights: a file of timm, torchvision, SupContrast, solo-learn or MoCo; a folder "
        "that `hpc-supcon push` wrote; hf:NAME or hf:NAME@REVISION, a model on the Hugging Face Hub; null: random"
    )
    train: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        min_length=1,
        description="train only these modules of the encoder, by the beginning of their names, such as "
        "[layer4, head]: head stands for all heads, projection for one. The rest keeps its weights and BatchNorm "
        "statistics; null: all is trained",
    )
    lora: LoraConfig = Field(description="low-rank adapters")
    out_dim: Count | None = Field(description="size of the features; null is the encoder's own")
    channels: dict[str, tuple[Count, ...]] | None = Field(
        min_length=1,
        description="layers of the encoder that are narrower than the architecture's, as prune.method=channels "
        "writes them: sizes of the weight's first two dimensions (BatchNorm: of its one), such as "
        "{layer1.0.conv1: [32, 64], layer1.0.bn1: [32], layer1.0.conv2: [64, 32]}; null: none",
    )
    projection_hidden: Count = Field(description="width of the projection's hidden layers")
    projection_dim: Count = Field(description="size of the embeddings the loss sees")
    projection_layers: Annotated[int, Field(ge=2)] = Field(description="linear layers of the projection")
    projection_norm: ProjectionNormName = Field(
        description="BatchNorm in the projection: none; after its hidden layers; after all (the last without weights)"
    )
    projection_activation: ActivationName = Field(
        description="between the projection's layers; gelu: with initial weights of a truncated normal distribution "
        "of std 0.02, as in DINO's head"
    )
    predictor_hidden: Count = Field(description="byol, simsiam: width of the predictor's hidden layer")
    momentum_encoder: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        description="keys of a queue and targets (byol, moco_v2, dino) come from a copy of the model that follows "
        "with this momentum per step (MoCo: 0.999); null: keys from the model itself"
    )
    momentum_final: Annotated[float, Field(gt=0, le=1)] | None = Field(
        description="byol, moco_v2, dino: the momentum at the end of training, reached by half a cosine (BYOL: 1); "
        "null: momentum_encoder in every step"
    )
    sync_bn: bool = Field(description="BatchNorm statistics over all ranks (with more than one rank)")

    @property
    def trained_whole(self) -> ModelConfig:
        """The same settings, but for training all weights: of a model whose adapters are merged."""
        lora = self.lora.model_copy(update={"rank": None, "targets": None})
        return self.model_copy(update={"train": None, "lora": lora})
