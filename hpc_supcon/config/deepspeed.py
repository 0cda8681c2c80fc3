"""The keys of DeepSpeed's own configuration that `train.deepspeed.config` may not set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ConfigError

DECIDED = {
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
"""DeepSpeed's keys that change what is trained, or where its state is kept, in ways that no checkpoint here saves."""


def check_own_keys(own: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key of `train.deepspeed.config` that is decided by another setting or unsupported."""
    given = set(_paths(own))
    for key, setting in DECIDED.items():
        if key in given:
            raise ConfigError(f"train.deepspeed.config: {key} is set by {setting}; leave it out")
    for key in UNSUPPORTED:
        if key in given:
            raise ConfigError(f"train.deepspeed.config: {key} is not supported; leave it out")


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key of a nested mapping, with dots."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
