"""Images of another size than the encoder takes: resized on purpose, or an error; never silently."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError


def resize_inputs(encoder: nn.Module, size: int) -> None:
    """Let `encoder` resize its input [N, C, H, W] to `size` x `size` px on the device, before anything else.

    A pre-hook adds nothing to the state dict and goes along with copies of the module.
    """
    encoder.register_forward_pre_hook(partial(_resize, size))


def _resize(size: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x: Tensor = args[0]
    if x.shape[-2:] == (size, size):
        return args
    # Antialiasing changes nothing where images grow, and there is no bf16 kernel for it on the CPU.
    shrinks = size < min(x.shape[-2:])
    return (F.interpolate(x, size=(size, size), mode="bilinear", antialias=shrinks), *args[1:])


def too_small(name: str, size: int, least: int) -> ConfigError:
    return ConfigError(
        f"model.encoder={name} cannot take images of {size} px, it needs {least}: set model.input_size={least} to "
        "have them resized for it"
    )
