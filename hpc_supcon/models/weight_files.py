"""Files of weights, as bytes: a path, a folder that `hpc-supcon push` wrote, or a model on the Hugging Face Hub.

Nothing here executes what it reads. From the Hub and from folders only safetensors and JSON are read.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, HubError
from ..hub_names import hub_name, is_on_hub
from .hub import download

WEIGHTS, CONFIG = "model.safetensors", "config.json"
OWN_KEY = "hpc_supcon"
"""Where config.json has the description from which this package builds the encoder."""
MAX_CONFIG = 1 << 20
"""Bytes; a config.json is some kilobytes."""


@dataclass(frozen=True)
class WeightFile:
    """One file of weights."""

    name: str
    """For people: its path, or hf:NAME@REVISION."""
    payload: bytes
    is_safetensors: bool
    commit: str | None = None
    """Of a model on the Hub."""
    made_for: str | None = None
    """The encoder that the config.json beside it names."""


def read_weight_file(where: str | Path) -> WeightFile:
    """The weights in `where`: a file, a folder with a model.safetensors, hf:NAME or hf:NAME@REVISION.

    Raises ConfigError; HubError and MissingExtra for a name of the Hub.
    """
    text = str(where)
    if is_on_hub(text):
        path, commit = download(*hub_name("model.weights", text), WEIGHTS)
        made_for = None
        with suppress(HubError, ConfigError):  # a model without, or with another one, may still fit
            made_for = _encoder_of(read_model_config(text, commit=commit))
        return WeightFile(text, _read(text, path), True, commit, made_for)
    path = Path(where)
    if not path.is_dir():
        return WeightFile(text, _read(text, path), path.suffix == ".safetensors")
    if not (path / WEIGHTS).exists():
        is_run = (path / "config.yaml").exists()
        raise ConfigError(
            f"model.weights={path}: no {WEIGHTS} in this folder; "
            + ("it is a run folder: make one of it with `hpc-supcon push`" if is_run else "give a file of weights")
        )
    made_for = None
    with suppress(ConfigError):
        made_for = _encoder_of(read_model_config(text))
    return WeightFile(str(path / WEIGHTS), _read(text, path / WEIGHTS), True, None, made_for)


def read_model_config(where: str, *, commit: str | None = None) -> dict[str, Any]:
    """config.json of a folder, or of a model on the Hub (of `commit`). Raises ConfigError, HubError, MissingExtra."""
    path = _path_beside(where, CONFIG, commit)
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_CONFIG))
    except OSError as error:
        raise ConfigError(f"{where}: {CONFIG} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{where}: {CONFIG} is damaged, or no JSON") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: {CONFIG} is no description of a model")
    return content


def read_beside(where: str, name: str, *, commit: str | None = None) -> bytes:
    """Another file of a folder, or of a model on the Hub. Raises as `read_model_config`."""
    return _read(f"{where}: {name}", _path_beside(where, name, commit))


def _path_beside(where: str, name: str, commit: str | None) -> Path:
    if not is_on_hub(where):
        return Path(where) / name
    model, revision = hub_name("model.weights", where)
    return download(model, commit or revision, name)[0]


def _encoder_of(config: dict[str, Any]) -> str | None:
    own = config.get(OWN_KEY)
    described = own.get("encoder") if isinstance(own, dict) else None
    name = described.get("name") if isinstance(described, dict) else config.get("architecture")
    return name if isinstance(name, str) else None


def _read(where: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"model.weights={where}: cannot be read: {error.strerror}") from None
