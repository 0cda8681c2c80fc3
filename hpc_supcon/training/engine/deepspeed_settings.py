"""The configuration that DeepSpeed is started with: this package's settings, with the user's merged into them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from ...errors import ConfigError

OURS = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size over the number of ranks",
    "gradient_accumulation_steps": "train.micro_batch_size, which makes pieces of a contrastive batch",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.name and its settings",
    "scheduler": "optim.schedule",
    "fp16": "train.precision=fp16",
    "bf16": "train.precision=bf16",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "checkpoint": "the section checkpoint",
    "zero_optimization.stage": "train.deepspeed.zero",
    "zero_optimization.compute_grad_norm": "optim.clip_norm; the norm is always logged",
    "zero_allow_untested_optimizer": "optim.name",
    "zero_force_ds_cpu_optimizer": "optim.name",
    "managed_gradient_accumulation": "train.micro_batch_size",
}
"""DeepSpeed's keys whose value follows from a setting of this package."""

UNSUPPORTED = (
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "zero_optimization.cpu_offload",
    "zero_optimization.zenflow",
    "tensor_parallel",
    "expert_parallel",
    "sequence_parallel_size",
    "elasticity",
    "autotuning",
    "data_efficiency",
    "curriculum_learning",
    "sparse_gradients",
    "hybrid_engine",
    "sparse_attention",
    "compression_training",
)
"""DeepSpeed's keys that change what is trained, or where state is kept, in ways that checkpoints do not support."""

BUCKET = 25_000_000
"""Numbers in one message of gradients; DeepSpeed's default, 5e8, would take 2 GB for a model of any size."""


def check_settings(user_config: Mapping[str, Any] | None) -> None:
    """Raise ConfigError for keys of `train.deepspeed.config` that contradict other settings."""
    flat = set(_paths(user_config or {}))
    for key, instead in OURS.items():
        if key in flat:
            raise ConfigError(f"train.deepspeed.config: {key} is set by {instead}; leave it out")
    for key in UNSUPPORTED:
        if key in flat:
            raise ConfigError(f"train.deepspeed.config: {key} is not supported; leave it out")


def deepspeed_settings(
    user_config: Mapping[str, Any] | None, *, zero: int, images_per_rank: int, parameters: int, scaled: bool
) -> dict[str, Any]:
    """DeepSpeed's JSON for `zero` 0, 1 or 2: our values, and those of `user_config`, which may not contradict them.

    parameters: number of trained parameters. scaled: the loss is scaled, so that DeepSpeed must check for overflows
    before its update, which costs another norm. Raises ConfigError.

    DeepSpeed trains fp32 weights here, under our autocast: its bf16 and fp16 modes would also cast norm layers and
    their statistics, and keep a second copy of the weights that no other engine has.
    """
    check_settings(user_config)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": images_per_rank,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's default clips to 1
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if zero:
        bucket = min(BUCKET, parameters + parameters % 2)
        settings["zero_optimization"] |= {"compute_grad_norm": scaled, "reduce_bucket_size": bucket}
    return _merged(settings, user_config or {})


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = deepcopy(base)
    for key, value in over.items():
        nested = isinstance(out.get(key), dict) and isinstance(value, Mapping)
        out[key] = _merged(out[key], value) if nested else deepcopy(value)
    return out


def _paths(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every key of a nested mapping, with dots."""
    found: list[str] = []
    for key, value in tree.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            found += _paths(value, f"{prefix}{key}.")
    return found
