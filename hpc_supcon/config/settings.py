"""What a configuration holds: as text, as a flat mapping, its digest, its differences from another one."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from . import yaml12
from .load import load_config
from .schema import Config
from .schema.base import settings_of
from .schema.names import Own

# Where the data is, what is logged and how long to wait do not change the results of pre-training.
NEUTRAL = (
    "name",
    "run_dir",
    "data.root",
    "data.image_root",
    "data.download",
    "data.workers",
    "data.timeout_s",
    "data.allow_change",
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
    "report",
    "runtime.reuse_memory",
    "runtime.timeout_s",
    "runtime.first_step_timeout_s",
    "runtime.start_timeout_s",
    "train.allow_world_size_change",
    "train.allow_code_change",
)

MAY_DIFFER = {
    "data.root": "nodes may keep their copies in different places; what is in them is compared",
    "data.beton": "as data.root",
    "data.download": "a node may lack the files",
    "data.workers": "nodes may have different numbers of cores",
    "runtime.threads": "as data.workers; so may HPC_SUPCON_CONCURRENT_RUNS, which divides them",
    "model.weights": "as data.root; the sha256 of the file is compared",
}
"""Settings that need not be the same on all ranks, and why. All others must be."""


def is_neutral(key: str) -> bool:
    """Whether a setting leaves the results of pre-training unchanged."""
    return any(key == name or key.startswith(f"{name}.") for name in NEUTRAL)


def to_yaml(config: Config) -> str:
    return yaml12.dumps(config.model_dump(mode="json"))


def digest(config: Config) -> str:
    """sha256 over every setting that changes the results of pre-training (see NEUTRAL)."""
    flat = {key: value for key, value in flatten(config).items() if not is_neutral(key)}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def differences(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every setting that changes the results of pre-training."""
    a, b = flatten(old), flatten(new)
    if a["data.beton"] and b["data.beton"]:
        a["data.beton"] = b["data.beton"]  # files that were moved; what is in them is compared
    return [f"{k}: {a.get(k)} -> {b.get(k)}" for k in {**a, **b} if a.get(k) != b.get(k) and not is_neutral(k)]


def shared_settings(config: Config) -> dict[str, str]:
    """`section.key` -> value, as text, of every setting that all ranks must have in common.

    Of a path that may differ, whether it is given. run_dir is the whole path of the run folder.
    """
    settings = {key: _as_text(value) for key, value in flatten(config).items() if key not in MAY_DIFFER}
    paths = {"data.root": config.data.root, "data.beton": config.data.beton, "model.weights": config.model.weights}
    given = {key: "null" if path is None else "(a path)" for key, path in paths.items()}
    return settings | given | {"run_dir": str(config.folder.absolute())}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def flatten(config: Config) -> dict[str, Any]:
    """`section.key` -> value of every setting."""
    return flatten_data(config.model_dump(mode="json"))


def flatten_data(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten_data(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def schema_rows() -> list[tuple[str, str, str, str, str]]:
    """(field, type, default, unit, meaning) of every setting, in the schema's order."""
    defaults = flatten(load_config())
    return [
        (
            key,
            _type_name(info.annotation),
            yaml12.dumps(defaults[key]).removesuffix("...\n").strip(),
            _unit(info),
            info.description or "",
        )
        for key, info in settings_of(Config)
    ]


def _unit(info: FieldInfo) -> str:
    extra = info.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def _type_name(annotation: Any) -> str:
    if annotation is None or annotation is type(None):
        return "null"
    if hasattr(annotation, "__metadata__"):
        if any(isinstance(getattr(m, "func", None), Own) for m in annotation.__metadata__):
            return "package.module:name"
        return _type_name(annotation.__origin__)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin is tuple:
        return f"[{', '.join('...' if a is ... else _type_name(a) for a in args)}]"
    if origin is dict:
        return f"{{{_type_name(args[0])}: {_type_name(args[1])}}}"
    if args:
        return " | ".join(_type_name(a) for a in args)
    return str(getattr(annotation, "__name__", annotation))
