"""Which operations of a model have no deterministic form on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ConfigError

# What raises on CUDA under torch.use_deterministic_algorithms, by the names of ATen's operators: see the list in the
# documentation of that function. Operations that no module has, such as a median's, are left out.
RAISING = frozenset(
    {
        "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward",
        "avg_pool3d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "max_unpool2d",
        "max_unpool3d", "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
        "upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward",
        "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss2d_forward",
        "nll_loss2d_backward", "_ctc_loss_backward", "put_", "put", "kthvalue", "histc", "grid_sampler_2d_backward",
        "grid_sampler_3d_backward",
    }
)  # fmt: skip


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def raising_operations(encoder: nn.Module, in_channels: int, image_size: int) -> list[str]:
    """The operations of a training step on images of `image_size` px that are in RAISING, in alphabetical order.

    The step is done on the meta device, which computes nothing.
    """
    state = {name: p.detach().to("meta").requires_grad_() for name, p in encoder.named_parameters()}
    state |= {name: b.to("meta") for name, b in encoder.named_buffers()}
    images = torch.empty(2, in_channels, image_size, image_size, device="meta")
    with _Operations() as seen:
        functional_call(encoder, state, (images,)).sum().backward()
    return sorted(seen.names & RAISING)


def check_deterministic(encoder: nn.Module, name: str, description: Mapping[str, Any], device: torch.device) -> None:
    """Raise ConfigError where training the encoder on `device` would raise under deterministic algorithms.

    `description`: the encoder's, with "in_channels" and "image_size". Without CUDA, or where the process may use any
    algorithm, there is nothing to check.
    """
    if device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        return
    found = raising_operations(encoder, description["in_channels"], description["image_size"])
    if found:
        raise ConfigError(
            f"deterministic=true: model.encoder={name} uses {', '.join(found)}, which PyTorch has only as a "
            "nondeterministic algorithm on CUDA; use another encoder, or deterministic=false"
        )
