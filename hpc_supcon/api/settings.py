"""Settings as Python values, in the form in which the command line gives them: both have the same checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import ConfigError

Settings = Mapping[str, Any]
"""`{"optim.lr": 0.1}` or `{"optim": {"lr": 0.1}}`."""


def recipe_of(config: str | Path | Settings | Config) -> tuple[str | Path, list[str]]:
    """(name or path of the recipe, the settings over it) of the `config` of a user. Raises ConfigError."""
    if isinstance(config, str | Path):
        return config, []
    if isinstance(config, Config):
        return "default", overrides_of(config.model_dump(mode="json"))
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"config is of type {type(config).__name__}; give a recipe's name, a YAML file, a mapping of settings "
            "or a Config"
        )
    settings = dict(config)
    base = settings.pop("base", "default")
    if not isinstance(base, str | Path):
        raise ConfigError(f"config: base must be the name of a recipe or a YAML file, not {base!r}")
    return base, overrides_of(settings)


def overrides_of(settings: Settings | None) -> list[str]:
    """`key.sub=value` of each setting; the value is JSON, which is YAML too. Raises ConfigError."""
    overrides = []
    for key, value in _by_section(settings or {}):
        try:
            text = json.dumps(value, ensure_ascii=False, default=_plain)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"settings: {key}: {error}; give numbers, texts, lists and mappings") from None
        overrides.append(f"{key}={text}")
    return overrides


def _by_section(settings: Settings) -> list[tuple[str, Any]]:
    """Each setting with its section: `{"optim": {"lr": 0.1}}` is `optim.lr`. What is below that stays as it is, for a
    setting may be a mapping itself."""
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if not isinstance(key, str):
            raise ConfigError(f"settings: {key!r} is no name of a setting, such as 'optim.lr'")
        if isinstance(value, Mapping) and value and "." not in key:
            found += [(f"{key}.{name}", inner) for name, inner in value.items()]
        else:
            found.append((key, value))
    return found


def _plain(value: Any) -> Any:
    """What JSON has no form for: paths, numbers of NumPy and PyTorch, mappings that are no dict."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset) or not callable(getattr(value, "item", None)):
        raise TypeError(f"a value of type {type(value).__name__}")
    return value.item()
