"""Rules between the settings of section `model`: where weights come from, and which of them are trained."""

from __future__ import annotations

import re
from typing import get_args

from ..errors import ConfigError
from .encoders import OWN_ENCODERS
from .schema import Config, names

DECODING = frozenset(get_args(names.DecoderLossName))
HUB = "hf:"
"""What a name of the Hugging Face Hub begins with where a path could stand."""
HUB_NAME = re.compile(r"hf:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w.][\w./-]*))?", re.ASCII)


def hub_name(setting: str, text: str) -> tuple[str, str | None]:
    """(name, revision) in `text`, "hf:NAME" or "hf:NAME@REVISION". Raises ConfigError, which names `setting`."""
    found = HUB_NAME.fullmatch(text)
    if found is None or ".." in text:
        raise ConfigError(
            f"{setting}={text}: a model on the Hugging Face Hub is hf:OWNER/NAME, with a branch, tag or commit "
            "hf:OWNER/NAME@REVISION"
        )
    return found["name"], found["revision"]


def check_model(config: Config) -> None:
    """Raise ConfigError. Which modules an encoder has, and whether two stems, is known once it is built."""
    model = config.model
    if model.encoder in OWN_ENCODERS and model.stem != "auto":
        raise ConfigError(f"model.stem={model.stem}: {model.encoder} has only its own stem; use auto")
    if DECODING & config.loss.weights.keys() and model.encoder != "conv":
        raise ConfigError(f"model.encoder={model.encoder} has no decoder, which reconstruction needs; use conv")
    if model.weights is not None and model.weights.startswith(HUB):
        hub_name("model.weights", model.weights)
    if model.lora.rank is None and model.lora.targets is not None:
        raise ConfigError("model.lora.targets are layers for adapters: set model.lora.rank as well (usual: 8)")
    if model.lora.rank is not None and model.train is not None:
        raise ConfigError(
            "model.train: model.lora.rank trains adapters and heads, and leaves all other weights as they are; use "
            "one of the two"
        )
