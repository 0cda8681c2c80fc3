"""Rules between the settings of section `model`: where weights come from, and which of them are trained."""

from __future__ import annotations

from typing import get_args

from ..errors import ConfigError
from ..hub_names import hub_name, is_on_hub
from .encoders import OWN_ENCODERS, is_own_encoder
from .schema import Config, names

DECODING = frozenset(get_args(names.DecoderLossName))


def check_model(config: Config) -> None:
    """Raise ConfigError. Which modules an encoder has, and whether two stems, is known once it is built."""
    model = config.model
    has_one_stem = model.encoder in OWN_ENCODERS or is_own_encoder(model.encoder)
    if has_one_stem and model.stem != "auto":
        raise ConfigError(f"model.stem={model.stem}: {model.encoder} has only its own stem; use auto")
    if DECODING & config.loss.weights.keys() and model.encoder != "conv":
        raise ConfigError(f"model.encoder={model.encoder} has no decoder, which reconstruction needs; use conv")
    if model.weights is not None and is_on_hub(model.weights):
        hub_name("model.weights", model.weights)
    if model.lora.rank is None and model.lora.targets is not None:
        raise ConfigError("model.lora.targets are layers for adapters: set model.lora.rank as well (usual: 8)")
    if model.lora.rank is not None and model.train is not None:
        raise ConfigError(
            "model.train: model.lora.rank trains adapters and heads, and leaves all other weights as they are; use "
            "one of the two"
        )
