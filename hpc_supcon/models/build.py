"""The model that pre-training optimizes (an encoder with named heads), and how it is built from a description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .encoders import build_encoder
from .freezing import keep_in_eval
from .heads import Predictor, Projection, build_decoder
from .lora import add_adapters, merge_adapters


class PretrainingModel(nn.Module):
    """An encoder with named heads: views [B, V, C, H, W] -> {head: its output [B, V, ...]}.

    Views of several sizes are given as a tensor for each size; the outputs have all views in that order. A head named
    "prediction" takes the output of "projection", which comes before it; all others take the features.
    """

    encoder: nn.Module

    def __init__(
        self, encoder: nn.Module, heads: Mapping[str, nn.Module], *, frozen_norms: tuple[str, ...] = ()
    ) -> None:
        """frozen_norms: names of BatchNorm layers that stay in eval mode when the model is set to training mode."""
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)
        self.frozen_norms = frozen_norms

    def train(self, mode: bool = True) -> PretrainingModel:
        super().train(mode)
        for name in self.frozen_norms:
            self.get_submodule(name).eval()
        return self

    def forward(self, views: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
        # All views in one forward pass, so that BatchNorm computes one set of statistics over all of them; with
        # several sizes one pass of the encoder for each, and one of the heads, as SwAV's and DINO's authors have it.
        sizes = (views,) if isinstance(views, Tensor) else views
        found = [self.encoder(x.flatten(0, 1)) for x in sizes]
        shape = (len(sizes[0]), sum(x.shape[1] for x in sizes))
        features = found[0]
        if len(found) > 1:
            own = [f.unflatten(0, x.shape[:2]) for f, x in zip(found, sizes, strict=True)]
            features = torch.cat(own, dim=1).flatten(0, 1)
        outputs: dict[str, Tensor] = {}
        for name, head in self.heads.items():
            outputs[name] = head(outputs["projection"] if name == "prediction" else features)
        return {name: output.unflatten(0, shape) for name, output in outputs.items()}


def build_model(description: Mapping[str, Any]) -> PretrainingModel:
    """A model whose weights are initialized from the global random generator. Raises ConfigError.

    `description` is what a checkpoint stores about its model: `encoder` (arguments of `build_encoder`), `heads`
    (their names), `projection` (arguments of `Projection`), `predictor` (of `Predictor`, where there is one),
    `classes` (their names) and `lora` (of `add_adapters`, where the encoder has adapters: see `adapt`).
    """
    model = build_without_adapters(description)
    adapt(model, description)
    return model


def build_without_adapters(description: Mapping[str, Any]) -> PretrainingModel:
    """As `build_model`, before the encoder gets its adapters: its tensors have the names that weight files have."""
    encoder = build_encoder(**description["encoder"])
    width = cast(int, encoder.feature_dim)
    return PretrainingModel(encoder, {head: build_head(head, description, width) for head in description["heads"]})


def adapt(model: PretrainingModel, description: Mapping[str, Any]) -> None:
    """Give the encoder the adapters of a description, if it has any; the rest of the encoder is frozen then."""
    if "lora" not in description:
        return
    images = {name: description["encoder"][name] for name in ("in_channels", "image_size")}
    add_adapters(model.encoder, **description["lora"], **images)
    keep_in_eval(model, lambda name: name.startswith("heads."))


def merged(model: PretrainingModel, description: Mapping[str, Any]) -> dict[str, Any]:
    """Add the adapters of `model`, if it has any, to its weights, in place; its description without them."""
    if "lora" not in description:
        return dict(description)
    merge_adapters(model.encoder)
    model.frozen_norms = ()
    return {name: value for name, value in description.items() if name != "lora"}


def build_head(name: str, description: Mapping[str, Any], feature_dim: int) -> nn.Module:
    """One head of `build_model`: "projection", "prediction" (from the projection's output, so it comes after it),
    "features" (the identity), "classifier" or "decoder"."""
    if name == "projection":
        return Projection(feature_dim, **description["projection"])
    if name == "prediction":
        return Predictor(description["projection"]["out_dim"], **description["predictor"])
    if name == "features":
        return nn.Identity()
    if name == "classifier":
        return nn.Linear(feature_dim, len(description["classes"]))
    assert name == "decoder"
    encoder = description["encoder"]
    return build_decoder(encoder["name"], feature_dim, encoder["in_channels"], encoder["image_size"])
