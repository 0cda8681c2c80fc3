"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) by the package peft.

An adapter adds (alpha / rank) B A x to what a layer computes of x, with A [rank, in] and B [out, rank] trained and
the layer's own weights frozen. B starts as zero, so that a model with adapters starts as the model without them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..errors import ConfigError, MissingExtra, unknown_name
from .timm_encoders import tensors_on_meta

SHOWN = 5
"""Names of layers in a message."""


def add_adapters(
    encoder: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | None,
    in_channels: int,
    image_size: int,
) -> list[str]:
    """Put adapters beside layers of `encoder`, in place, and freeze everything else in it.

    targets: names of linear layers and convolutions, or the ends of names ("qkv" for every "blocks.N.attn.qkv");
    None: all linear layers. in_channels, image_size (px): of the images that the encoder takes. Draws A from the
    global random generator. Returns the names of the layers.

    Raises MissingExtra without peft; ConfigError for a target that does not exist, that cannot have an adapter, or
    whose weights the encoder reads itself, so that an adapter would have no effect.
    """
    layers = choose_layers(encoder, targets, in_channels, image_size)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise _missing() from error
    # a regular expression: peft takes a list as ends of names, of which there may be others
    names = "|".join(re.escape(name) for name in layers)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names),  # type: ignore[arg-type]
        encoder,
    )
    return layers


def merge_adapters(encoder: nn.Module) -> None:
    """Add every adapter to the weights of its layer, and make `encoder` what it was before `add_adapters`, in place.

    The names of its tensors are those of the architecture again. Raises MissingExtra without peft.
    """
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise _missing() from error
    for name, module in list(encoder.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            encoder.set_submodule(name, module.get_base_layer())
    if hasattr(encoder, "peft_config"):
        del encoder.peft_config
    encoder.requires_grad_(True)


def _missing() -> MissingExtra:
    return MissingExtra("model.lora.rank needs peft; install it with: pip install 'hpc-supcon[lora]'")


def choose_layers(encoder: nn.Module, targets: Sequence[str] | None, in_channels: int, image_size: int) -> list[str]:
    """The names of the layers that `targets` means: see `add_adapters`."""
    layers = {name: module for name, module in encoder.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    called = _called(encoder, layers, in_channels, image_size)
    if targets is None:
        linear = [name for name in called if isinstance(layers[name], nn.Linear)]
        if not linear:
            raise ConfigError(
                f"model.lora.rank: {type(encoder).__name__} has no linear layer for an adapter: name convolutions in "
                f"model.lora.targets, such as {_some(_without_groups(called, layers))}"
            )
        return linear
    chosen: list[str] = []
    for target in targets:
        found = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not found:
            ends = {".".join(name.split(".")[i:]) for name in called for i in range(name.count(".") + 1)}
            listed = _some(_without_groups(called, layers))
            raise ConfigError("model.lora.targets: " + unknown_name("layer", target, ends, listed=listed))
        if unused := [name for name in found if name not in called]:
            raise ConfigError(
                f"model.lora.targets: {target}: {type(encoder).__name__} reads the weights of {_some(unused)} "
                f"itself, so that an adapter would have no effect; name others, such as {_some(called)}"
            )
        if grouped := [name for name in found if name not in _without_groups(found, layers)]:
            raise ConfigError(
                f"model.lora.targets: {target}: a convolution in groups has no adapter: {_some(grouped)}; name others"
            )
        chosen += [name for name in found if name not in chosen]
    return chosen


def _called(encoder: nn.Module, layers: dict[str, Any], in_channels: int, image_size: int) -> list[str]:
    """Those of `layers` that a forward pass calls: some architectures read a layer's weight instead, such as those
    with torch.nn.MultiheadAttention. The pass is done on the meta device, which takes milliseconds."""
    seen: set[int] = set()
    hooks = [layer.register_forward_pre_hook(lambda module, _: seen.add(id(module))) for layer in layers.values()]
    modes = [(module, module.training) for module in encoder.modules()]
    try:
        with torch.no_grad():
            images = torch.empty(2, in_channels, image_size, image_size, device="meta")
            functional_call(encoder.eval(), tensors_on_meta(encoder), (images,), tie_weights=False)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return [name for name, layer in layers.items() if id(layer) in seen]


def _without_groups(names: Sequence[str], layers: dict[str, Any]) -> list[str]:
    return [name for name in names if getattr(layers[name], "groups", 1) == 1]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
