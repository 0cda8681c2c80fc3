"""The configuration that DeepSpeed is started with: this package's settings, with the user's merged into them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

BUCKET = 25_000_000
"""Numbers in one message of gradients; DeepSpeed's default, 5e8, would take 2 GB for a model of any size."""


def deepspeed_settings(
    user_config: Mapping[str, Any] | None, *, zero: int, images_per_rank: int, parameters: int, scaled: bool
) -> dict[str, Any]:
    """DeepSpeed's JSON for `zero` 0, 1 or 2: our values, with `user_config` merged over them.

    parameters: number of trained parameters. scaled: the loss is scaled, so that DeepSpeed must check for overflows
    before its update, which costs another norm.

    DeepSpeed trains fp32 weights here, under our autocast: its bf16 and fp16 modes would also cast norm layers and
    their statistics, and keep a second copy of the weights that no other engine has.
    """
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
