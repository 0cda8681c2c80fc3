"""Encoders of timm: with a stem for small images, and a check that they accept images of the given size."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import DenseNet, ResNet
from timm.models.vgg import ConvMlp
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ConfigError, first_line
from .pooling import average_pool2d

STEMS = ("auto", "small", "standard")
SMALL_STEM_UP_TO = 64  # px; the standard stem reduces smaller images to too few positions


def build_timm_encoder(name: str, in_channels: int, size: int, stem: str, out_dim: int | None) -> nn.Module:
    """timm's model `name` for square images of `size` px: see `build_encoder`. Raises ConfigError."""
    try:
        model = _create(name, in_channels, size, stem, out_dim)
        model.feature_dim = feature_dim_at(model, in_channels, size)
    except ConfigError:
        raise
    except Exception as error:  # timm's models raise anything for sizes that they do not accept
        raise _cannot_take(name, in_channels, size, error) from error
    model.output_layers = _classifiers(model) if out_dim else ()
    return model


def has_both_stems(model: nn.Module) -> bool:
    """Whether the small stem can replace the standard one: in ResNets (also ResNeXt, SE-, Res2Net, ResNeSt, wide
    ones) and DenseNets. VGG's only stem suits small images too."""
    return isinstance(model, (ResNet, DenseNet))


def only_its_own_stem(name: str, stem: str) -> ConfigError:
    return ConfigError(f"model.stem={stem}: {name} has only its own stem; leave it at auto")


def _create(name: str, in_channels: int, size: int, stem: str, out_dim: int | None) -> Any:
    # models with position embeddings or windows are built for one image size
    cfg = timm.get_pretrained_cfg(name)
    fixed = cfg is not None and cfg.fixed_input_size and cfg.input_size[-1] != size
    sized: dict[str, Any] = {"img_size": size} if fixed else {}
    model: Any = timm.create_model(name, pretrained=False, num_classes=out_dim or 0, in_chans=in_channels, **sized)
    for module in model.modules():
        if isinstance(module, ConvMlp):
            module.register_forward_pre_hook(_fill_kernel)
    if not has_both_stems(model):
        if stem != "auto":
            raise only_its_own_stem(name, stem)
        model.stem_kind = "own"  # not `stem`: some of timm's models have a layer of that name
        return model
    small = stem == "small" or (stem == "auto" and size <= SMALL_STEM_UP_TO)
    if small:
        _make_stem_small(model)
    model.stem_kind = "small" if small else "standard"
    return model


def _make_stem_small(model: Any) -> None:
    """A 3x3 convolution of stride 1 in place of 7x7 of stride 2, and no max-pool (SimCLR, appendix B.9)."""
    dense = isinstance(model, DenseNet)
    parent: Any = model.features if dense else model
    conv, pool = ("conv0", "pool0") if dense else ("conv1", "maxpool")
    first, pooling = getattr(parent, conv), getattr(parent, pool)
    if isinstance(first, nn.Sequential):  # a deep stem consists of 3x3 convolutions already
        first = first[0]
    if first.kernel_size == (3, 3):
        first.stride = (1, 1)
    else:
        small = nn.Conv2d(first.in_channels, first.out_channels, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
        setattr(parent, conv, small)
    if any(True for _ in pooling.parameters()):  # ResNet-RS has a strided convolution here: it stays, with stride 1
        pooling[0].stride = (1, 1)
    else:
        setattr(parent, pool, nn.Identity())


def _fill_kernel(module: ConvMlp, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """VGG's first classifier layer averages smaller maps up to its kernel: here by a deterministic operation."""
    x: Tensor = args[0]
    side = module.input_kernel_size
    return (average_pool2d(x, max(side, x.shape[-2]), max(side, x.shape[-1])), *args[1:])


def feature_dim_at(model: nn.Module, in_channels: int, size: int) -> int:
    """Width of the model's output, found by a forward pass on the meta device, which takes milliseconds."""
    with torch.no_grad():
        images = torch.empty(2, in_channels, size, size, device="meta")
        features = functional_call(model.eval(), tensors_on_meta(model), (images,), tie_weights=False)
    model.train()
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise ValueError("it returns no feature vectors")
    return features.shape[1]


def tensors_on_meta(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers on the meta device, each module's under one name.

    Some of timm's models (CoaT) have a module in several places. `functional_call` replaces the tensors of each name
    and puts them back in the same order, so that those of such a module would stay replaced.
    """
    meta: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        meta |= {f"{prefix}.{name}" if prefix else name: tensor.to("meta") for name, tensor in own}
    return meta


def _classifiers(model: Any) -> tuple[str, ...]:
    """Names of the model's classifier layers."""
    names = model.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


def _cannot_take(name: str, in_channels: int, size: int, error: Exception) -> ConfigError:
    """An error that names the smallest size that works, or else holds timm's message."""
    cfg = timm.get_pretrained_cfg(name)
    usual = cfg.input_size[-1] if cfg is not None else 224
    for_any_size = None if cfg is None or cfg.fixed_input_size else _on_meta(name, in_channels, size)

    def takes(side: int) -> bool:
        try:
            feature_dim_at(for_any_size or _on_meta(name, in_channels, side), in_channels, side)
        except Exception:  # of any type: the model does not accept this size
            return False
        return True

    if size < usual and takes(usual):
        low, high = size, usual
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if takes(middle) else (middle, high)
        return too_small(name, size, high)
    return ConfigError(
        f"model.encoder={name} cannot take images of {size} px with {in_channels} channel(s): {first_line(error)} "
        f"(it was made for {usual} px; see model.input_size, data.channels)"
    )


def _on_meta(name: str, in_channels: int, size: int) -> nn.Module:
    with torch.device("meta"):
        return _create(name, in_channels, size, "auto", None)


def resize_inputs(encoder: nn.Module, size: int) -> None:
    """Make `encoder` first resize its input [N, C, H, W] to `size` x `size` px, on the device.

    This is a forward pre-hook: it adds nothing to the state dict, and copies of the module have it too.
    """
    encoder.register_forward_pre_hook(partial(_resize, size))


def _resize(size: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x: Tensor = args[0]
    if x.shape[-2:] == (size, size):
        return args
    # Antialiasing has no effect where images become larger, and PyTorch has no bf16 kernel for it on the CPU.
    shrinks = size < min(x.shape[-2:])
    return (F.interpolate(x, size=(size, size), mode="bilinear", antialias=shrinks), *args[1:])


def too_small(name: str, size: int, least: int) -> ConfigError:
    return ConfigError(
        f"model.encoder={name} cannot take images of {size} px, it needs {least}: set model.input_size={least} to "
        "have them resized for it"
    )
