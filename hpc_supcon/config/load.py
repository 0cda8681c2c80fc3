"""From recipes, files and `key.sub=value` overrides to one validated configuration.

The defaults are in one place, recipes/default.yaml. A recipe is merged over it, the overrides over the recipe, and
the result is validated as a whole.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError, unknown_name
from ..old_names import warn_old_name
from ..renamed import SETTINGS
from . import code, yaml12
from .check import Stage, check_config
from .explain import explain, name_origin, unknown_key
from .schema import Config

OPTIONS = tuple(f"{section}.options" for section in ("data", "augment", "model", "loss", "probe"))
"""Settings that are mappings with keys of their own: a later one adds to them."""
NUMBER_OR_MAPPING = ("data.views",)
"""Settings that are a number, or a mapping whose keys are given like those of a section."""


def recipe_names() -> list[str]:
    folder = resources.files("hpc_supcon.config") / "recipes"
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_config(
    path_or_name: str | Path = "default",
    overrides: list[str] | tuple[str, ...] = (),
    *,
    stages: tuple[Stage, ...] = (),
) -> Config:
    """The validated configuration: default.yaml, then the recipe, then `key.sub=value` overrides.

    `path_or_name` is a recipe that ships with the package, or a YAML file (anything with a slash or
    ending in .yaml/.yml). A recipe may name another one as its `base`, which it is then merged over.
    With `stages`, the configuration is also checked for these stages (see `check_config`).
    Import paths in overrides and in files are allowed by that, but for those in the files of run folders and grid
    folders (see code.py). Raises ConfigError, which names the recipe, file or override that the wrong setting comes
    from; CodeNotAllowed.
    """
    data, origins = resolve(path_or_name, overrides)
    config = validated(json.dumps(data), origins, _where(path_or_name))
    try:
        check_config(config, stages=stages)
    except ConfigError as error:
        raise type(error)(name_origin(str(error), origins, _where(path_or_name))) from error.__cause__
    return config


def resolve(
    path_or_name: str | Path = "default", overrides: list[str] | tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """(all settings, setting -> who gave it where that is not default.yaml), merged but not yet validated."""
    data, origins = _read("default"), dict[str, str]()
    for recipe, changes in _with_bases(path_or_name):
        if _is_path(recipe):
            code.given(changes, str(recipe), recipe)
        merge(data, changes, _where(recipe), origins)
    for override in overrides:
        changes, where = parse_override(override), f"override {override!r}"
        code.given(changes, where)
        merge(data, changes, where, origins)
    return data, origins


def validated(text: str, origins: dict[str, str], where: str) -> Config:
    """The configuration in the JSON `text`. Raises ConfigError, with `origins` and `where` as in `explain`."""
    try:
        return Config.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(explain(error, origins, where)) from None


def _with_bases(path_or_name: str | Path) -> list[tuple[str | Path, dict[str, Any]]]:
    """The recipe and its bases, the deepest base first. Raises ConfigError."""
    chain: list[tuple[str | Path, dict[str, Any]]] = []
    current: str | Path | None = None if str(path_or_name) == "default" else path_or_name
    while current is not None:
        changes = _read(current)
        base = changes.pop("base", None)
        chain.insert(0, (current, changes))
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"{_where(current)}: base must be the name of a recipe or a YAML file, not {base!r}")
        if base is not None and _is_path(base):
            base = Path(current).parent / base if _is_path(current) else Path(base)
        if base is not None and any(_same(base, seen) for seen, _ in chain):
            raise ConfigError(f"{_where(current)}: base {str(base)!r} leads back to itself")
        current = None if base == "default" else base
    return chain


def _same(a: str | Path, b: str | Path) -> bool:
    return Path(a).resolve() == Path(b).resolve() if _is_path(a) and _is_path(b) else str(a) == str(b)


def _is_path(path_or_name: str | Path) -> bool:
    text = str(path_or_name)
    return isinstance(path_or_name, Path) or "/" in text or text.endswith((".yaml", ".yml"))


def _where(path_or_name: str | Path) -> str:
    return str(path_or_name) if _is_path(path_or_name) else f"recipe {path_or_name!r}"


def _read(path_or_name: str | Path) -> dict[str, Any]:
    where = _where(path_or_name)
    if _is_path(path_or_name):
        try:
            text = Path(path_or_name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigError(f"{where}: cannot be read: {reason}") from None
    else:
        if path_or_name not in recipe_names():
            raise ConfigError(unknown_name("recipe", path_or_name, recipe_names()) + " (or give a .yaml file)")
        text = (resources.files("hpc_supcon.config") / "recipes" / f"{path_or_name}.yaml").read_text(encoding="utf-8")
    data = yaml12.loads(text, where)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: must be a mapping of settings, not {type(data).__name__}")
    return data


def parse_override(override: str) -> dict[str, Any]:
    """`a.b=c` as nested settings. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: write key.sub=value, such as data.batch_size=512")
    value: Any = yaml12.loads(text, f"override {override!r}")
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(
    into: dict[str, Any], changes: dict[str, Any], where: str, origins: dict[str, str], prefix: str = ""
) -> None:
    """Merge `changes`, given by `where`, into `into`; every key must exist there, for default.yaml is complete.

    `origins` gets setting -> `where`. Raises ConfigError for an unknown key, or a value in place of a section.
    """
    for key, value in changes.items():
        path = f"{prefix}{key}"
        if path in SETTINGS:
            old, (key, gone_in) = path, SETTINGS[path]
            path = f"{prefix}{key}"
            if key in changes:
                raise ConfigError(f"{where}: {old} is the old name of {path}, which is given as well; drop one")
            warn_old_name(old, path, gone_in, where)
        if key not in into and prefix.removesuffix(".") not in NUMBER_OR_MAPPING:
            raise ConfigError(f"{where}: {unknown_key(path, into, prefix)}")
        if isinstance(into.get(key), dict) and path in OPTIONS and isinstance(value, dict):
            into[key], origins[path] = {**into[key], **value}, where
        elif (
            isinstance(into.get(key), dict)
            and path not in OPTIONS
            and (path not in NUMBER_OR_MAPPING or isinstance(value, dict))
        ):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: {path} is a section with its own keys: {', '.join(into[key])}")
            merge(into[key], value, where, origins, f"{path}.")
        else:
            into[key], origins[path] = value, where
