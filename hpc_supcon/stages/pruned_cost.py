"""What results.json says about the costs of a pruned encoder: parameters, multiply-accumulates, time of a pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..distributed.launch import Runtime
from ..models import PretrainingModel
from ..pruning import count_macs, measure_latency, to_semi_structured
from .pruned_weights import Trained


def cost_of(pruned: Config, dense: PretrainingModel, after: Trained, runtime: Runtime) -> dict[str, Any]:
    """{"parameters", "macs", "nonzero_macs" (of one image), "dense_parameters", "dense_macs", "latency"} of encoders.

    latency: {model: {batch size: {"median_ms", ...} or null}}, see `measure_latency`; null where it is not timed.
    """
    encoder = after.found.state["encoder"]
    shape = encoder["in_channels"], encoder["image_size"], encoder["image_size"]
    facts = {}
    for prefix, model in (("", after.model), ("dense_", dense)):
        facts[f"{prefix}parameters"] = sum(p.numel() for p in model.encoder.parameters())
        facts |= {f"{prefix}{name}": n for name, n in count_macs(model.encoder, torch.zeros(1, *shape)).items()}
    del facts["dense_nonzero_macs"]
    models, latency = _timed(pruned, dense.encoder, after.model.encoder, runtime), pruned.prune.latency
    times = None
    if models and latency.batch_sizes:
        measured = measure_latency(models, shape, batch_sizes=latency.batch_sizes, seconds=latency.seconds)
        times = {name: {str(batch): one for batch, one in rows.items()} for name, rows in measured.items()}
    return {**facts, "latency": times}


def _timed(pruned: Config, dense: nn.Module, encoder: nn.Module, runtime: Runtime) -> dict[str, nn.Module]:
    """The models to compare: none where a pruned one takes as long as the dense one."""
    on_cuda = runtime.device.type == "cuda"
    is_narrower = pruned.prune.method == "channels"
    if not is_narrower and not (on_cuda and pruned.prune.pattern == (2, 4)):
        return {}
    models = [copy.deepcopy(model).to(runtime.device).eval() for model in (dense, encoder)]
    if is_narrower:
        return {"dense": models[0], "channels": models[1]}
    models = [model.half() for model in models]
    converted, _ = to_semi_structured(models[1])
    return {"dense_fp16": models[0], "2of4_fp16": models[1]} if converted else {}
