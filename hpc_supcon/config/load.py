"""The configuration: one frozen, typed schema; YAML recipes; `key.sub=value` overrides.

The defaults stand in one place, recipes/default.yaml. A recipe is merged over it, overrides over the
recipe, and the result is validated at once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..errors import ConfigError, unknown_name
from ..renamed import SETTINGS
from . import yaml12
from .schema import Config as Config

# Where the data lie, what is shown and how long to wait do not change what is computed.
NEUTRAL = (
    "name",
    "run_dir",
    "data.root",
    "data.download",
    "data.workers",
    "data.timeout_s",
    "train.engine",
    "train.deepspeed",
    "train.compile",
    "train.cuda_graphs",
    "train.activation_checkpointing",
    "train.profile",
    "train.gc_every_steps",
    "checkpoint",
    "log",
    "probe",
    "prune",
    "runtime.reuse_memory",
    "runtime.timeout_s",
    "runtime.first_step_timeout_s",
    "train.allow_world_size_change",
)


def recipe_names() -> list[str]:
    folder = resources.files("hpc_supcon.config") / "recipes"
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_config(path_or_name: str | Path = "default", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The validated configuration: default.yaml, then the recipe, then `key.sub=value` overrides.

    `path_or_name` is a recipe that ships with the package, or a YAML file (anything with a slash or
    ending in .yaml/.yml). A recipe may name another one as its `base`, which it is then merged over.
    Raises ConfigError.
    """
    data, origins = resolve(path_or_name, overrides)
    return validated(json.dumps(data), origins, _where(path_or_name))


def resolve(
    path_or_name: str | Path = "default", overrides: list[str] | tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """(complete settings, where each one came from), merged as by `load_config` but not yet validated."""
    data, origins = _read("default"), dict[str, str]()
    for recipe, changes in _with_bases(path_or_name):
        merge(data, changes, _where(recipe), origins)
    for override in overrides:
        merge(data, parse_override(override), f"override {override!r}", origins)
    return data, origins


def validated(text: str, origins: dict[str, str], where: str) -> Config:
    """The configuration in the JSON `text`; `origins` and `where` say in errors what to correct."""
    try:
        return Config.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(_explain(error, origins, where)) from None


def _with_bases(path_or_name: str | Path) -> list[tuple[str | Path, dict[str, Any]]]:
    """The recipe and all it builds on, the deepest base first."""
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


def to_yaml(config: Config) -> str:
    return yaml12.dumps(config.model_dump(mode="json"))


def digest(config: Config) -> str:
    """sha256 over everything that changes what is computed (not paths, logging or time-outs)."""
    flat = {key: value for key, value in flatten(config).items() if not is_neutral(key)}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def differences(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every setting that changes what is computed."""
    a, b = flatten(old), flatten(new)
    return [f"{k}: {a.get(k)} -> {b.get(k)}" for k in {**a, **b} if a.get(k) != b.get(k) and not is_neutral(k)]


def flatten(config: Config) -> dict[str, Any]:
    """`section.key` -> value of every setting."""
    return flatten_data(config.model_dump(mode="json"))


def flatten_data(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten_data(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def schema_rows() -> list[tuple[str, str, str, str, str]]:
    """(field, type, default, unit, meaning) of every field, in the schema's order."""
    defaults = flatten(load_config())
    return [
        (
            key,
            _type_name(info),
            yaml12.dumps(defaults[key]).removesuffix("...\n").strip(),
            _unit(info),
            info.description or "",
        )
        for key, info in _fields(Config)
    ]


def is_neutral(key: str) -> bool:
    """Whether a setting changes nothing that is computed in pre-training."""
    return any(key == name or key.startswith(f"{name}.") for name in NEUTRAL)


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _fields(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def _unit(info: FieldInfo) -> str:
    extra = info.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def _type_name(info: FieldInfo) -> str:
    def name(annotation: Any) -> str:
        if annotation is None or annotation is type(None):
            return "null"
        if getattr(annotation, "__origin__", None) is Literal:
            return " | ".join(str(a) for a in get_args(annotation))
        if hasattr(annotation, "__metadata__"):
            return name(annotation.__origin__)
        if args := get_args(annotation):
            if getattr(annotation, "__origin__", None) is tuple:
                return f"[{', '.join('...' if a is ... else name(a) for a in args)}]"
            return " | ".join(name(a) for a in args)
        return str(getattr(annotation, "__name__", annotation))

    return name(info.annotation)


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
    """Merge in place, noting where each value came from. Every key must exist: default.yaml is complete.

    Raises ConfigError for an unknown key, or a value in place of a section.
    """
    for key, value in changes.items():
        path = f"{prefix}{key}"
        if path in SETTINGS:
            key = SETTINGS[path]
            if key in changes:
                raise ConfigError(
                    f"{where}: {path} is the old name of {prefix}{key}, which is given as well; drop one"
                )
            path = f"{prefix}{key}"
        if key not in into:
            raise ConfigError(f"{where}: {_unknown_key(path, into, prefix)}")
        if isinstance(into[key], dict):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: {path} is a section with its own keys: {', '.join(into[key])}")
            merge(into[key], value, where, origins, f"{path}.")
        else:
            into[key], origins[path] = value, where


def _unknown_key(path: str, siblings: dict[str, Any], prefix: str) -> str:
    every = [key for key, _ in _fields(Config)]
    near = difflib.get_close_matches(path, [f"{prefix}{k}" for k in siblings], n=1)
    # the right name in the wrong section: batch_size -> data.batch_size
    near = near or [k for k in every if k.endswith(f".{path.rpartition('.')[2]}")]
    near = near or difflib.get_close_matches(path, every, n=1)
    return f"unknown key {path!r}" + (
        f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(siblings)}"
    )


def _explain(error: ValidationError, origins: dict[str, str], where: str) -> str:
    # A union reports once per member: the first error of the first field is enough for one line.
    first = error.errors(include_url=False)[0]
    key = ".".join(
        str(part) for part in first["loc"] if not str(part).startswith(("constrained", "literal", "tuple"))
    )
    names = dict(_fields(Config))
    while key and key not in names and "." in key and key.rpartition(".")[0] in names:
        key = key.rpartition(".")[0]
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] in ("missing", "value_error") else f", not {first['input']!r}"
    return f"{origins.get(key, where)}: {key}: {message[:1].lower() + message[1:]}{given}"
