"""What a pruned model costs: multiply-accumulates that are left, and the time of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..phases import REST, Clock

MIN_CALLS = 9
"""Fewest timed calls of each model."""


@torch.no_grad()
def count_macs(module: nn.Module, example: Tensor) -> dict[str, int]:
    """Multiply-accumulates of a forward pass: {"macs": of all weights, "nonzero_macs": of those that are not zero}.

    Those of convolutions and linear layers: each weight once per position of the layer's output, borders that are
    padded included. What has no such weight (norms, attention between tokens) is not counted. example: an input, on
    the module's device; the counts are of all its images.
    """
    counts = {"macs": 0, "nonzero_macs": 0}

    def add(layer: Any, args: Any, output: Tensor) -> None:
        # a transposed convolution uses each weight once per position of its input
        positions = args[0] if isinstance(layer, _ConvNd) and layer.transposed else output
        width = layer.weight.shape[0]
        counts["macs"] += layer.weight.numel() * (positions.numel() // width)
        counts["nonzero_macs"] += int(layer.weight.count_nonzero()) * (positions.numel() // width)

    layers = [layer for layer in module.modules() if isinstance(layer, (_ConvNd, nn.Linear))]
    handles = [layer.register_forward_hook(add) for layer in layers]
    training = {m: m.training for m in module.modules()}
    try:
        module.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
        for m, mode in training.items():
            m.training = mode
    return counts


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, nn.Module],
    shape: Sequence[int],
    *,
    batch_sizes: Sequence[int] = (1, 256),
    seconds: float = 5.0,
    seed: int = 0,
) -> dict[str, dict[int, dict[str, float] | None]]:
    """Milliseconds of a forward pass: {model: {batch size: {"median_ms", "low_ms", "high_ms", "calls"}}}.

    The models are called in turn, so that all of them see the same load of the machine, for `seconds` per batch size
    and at least MIN_CALLS times each, after two calls that are not counted. low and high: the first and the ninth
    decile. None, for a batch size at which the device's memory does not suffice for one of the models, or one of its
    calls takes longer than `seconds`.

    models: in eval mode, each on its device and in its dtype. shape: (C, H, W) of an image. On CUDA the time is the
    device's.
    """
    results: dict[str, dict[int, dict[str, float] | None]] = {name: {} for name in models}
    for batch in batch_sizes:
        try:
            taken = _alternate(models, (batch, *shape), seconds, seed)
        except torch.OutOfMemoryError:
            taken = None
        for name in models:
            results[name][batch] = None if taken is None else _summary(taken[name])
    return results


def _alternate(
    models: Mapping[str, nn.Module], shape: tuple[int, ...], seconds: float, seed: int
) -> dict[str, list[float]] | None:
    """Seconds of every call by model; None where one takes longer than `seconds`."""
    generator = torch.Generator().manual_seed(seed)
    images, calls = torch.randn(shape, generator=generator), {}
    for name, model in models.items():
        parameter = next(model.parameters())
        own = images.to(parameter.device, parameter.dtype)
        calls[name] = partial(model, own), parameter.device
        model(own)  # allocates memory and chooses kernels
        if _seconds_of(*calls[name]) > seconds:
            return None
    taken: dict[str, list[float]] = {name: [] for name in models}
    spent = 0.0
    while spent < seconds * len(models) or len(next(iter(taken.values()))) < MIN_CALLS:
        for name, (call, device) in calls.items():
            taken[name].append(_seconds_of(call, device))
            spent += taken[name][-1]
    return taken


def _seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """On CUDA of the device's work."""
    clock = Clock(device)
    clock.switch("call")
    call()
    clock.switch(REST)
    return clock.read()["call"]


def _summary(taken: list[float]) -> dict[str, float]:
    deciles = quantiles(taken, n=10)
    numbers = {"median_ms": median(taken), "low_ms": deciles[0], "high_ms": deciles[-1]}
    return {name: round(1e3 * value, 4) for name, value in numbers.items()} | {"calls": len(taken)}
