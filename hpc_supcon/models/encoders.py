"""Encoders by name: `encoder(x [N, C, H, W]) -> [N, feature_dim]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import timm
from torch import Tensor, nn

from ..errors import ConfigError, first_line, unknown_name
from ..parts import check_no_shadow, find
from .own_encoder import build_own_encoder
from .pooling import AveragePool2d, GlobalMaxPool2d
from .timm_encoders import STEMS, build_timm_encoder, feature_dim_at, only_its_own_stem, resize_inputs, too_small
from .widths import set_widths


def _conv_bn_relu(c_in: int, c_out: int, *, stride: int = 1, pool: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)]
    if pool:  # before BatchNorm, which then normalizes a quarter of the values
        layers.append(nn.MaxPool2d(2))
    return [*layers, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


class ConvEncoder(nn.Module):
    """Three strided 3x3 convolutions 32-64-128 (BatchNorm, ReLU), flattened, one linear layer to `out_dim`."""

    def __init__(self, in_channels: int, image_size: int, out_dim: int | None) -> None:
        super().__init__()
        self.feature_dim = out_dim or 128
        side = image_size
        for _ in range(3):
            side = (side + 1) // 2
        self.convs = nn.Sequential(
            *_conv_bn_relu(in_channels, 32, stride=2),
            *_conv_bn_relu(32, 64, stride=2),
            *_conv_bn_relu(64, 128, stride=2),
        )
        self.latent = nn.Linear(128 * side * side, self.feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.latent(self.convs(x).flatten(1))


class _Residual(nn.Module):
    """x + two 3x3 convolutions of x (BatchNorm, ReLU)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv_bn_relu(channels, channels), *_conv_bn_relu(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResNet9(nn.Module):
    """Nine-layer residual network for images of 32 px (after David Page's DAWNBench entry, 2018).

    `width` is the number of channels of the first layer: 64 in the original; 16 trains on two CPU cores in minutes.
    """

    def __init__(self, in_channels: int, image_size: int, out_dim: int | None, *, width: int) -> None:
        super().__init__()
        if image_size < 16:
            raise too_small("resnet9", image_size, 16)
        w = width
        self.feature_dim = out_dim or 8 * w
        self.layers = nn.Sequential(
            *_conv_bn_relu(in_channels, w),
            *_conv_bn_relu(w, 2 * w, pool=True),
            _Residual(2 * w),
            *_conv_bn_relu(2 * w, 4 * w, pool=True),
            *_conv_bn_relu(4 * w, 8 * w, pool=True),
            _Residual(8 * w),
            GlobalMaxPool2d(),
            nn.Flatten(),
        )
        self.latent = nn.Linear(8 * w, out_dim) if out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.latent(self.layers(x))


class Vgg16BnEmbed(nn.Module):
    """VGG-16 with BatchNorm, average-pooled to 7x7, and one linear layer 25,088 -> `out_dim` (64 by default).

    Simonyan & Zisserman 2015, configuration D. 16,328,832 parameters for 3 channels and an `out_dim` of 64. The
    convolutions have the names of torchvision and timm, `features.N`. It halves the image five times, so images need
    at least 32 px.
    """

    # Output channels of the convolutions; M is a max-pooling layer.
    LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")

    def __init__(self, in_channels: int, image_size: int, out_dim: int | None) -> None:
        super().__init__()
        if image_size < 32:
            raise too_small("vgg16_bn_embed", image_size, 32)
        self.feature_dim = out_dim or 64
        layers: list[nn.Module] = []
        channels = in_channels
        for width in self.LAYERS:
            if isinstance(width, int):
                conv = nn.Conv2d(channels, width, 3, padding=1)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, conv.bias))
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = AveragePool2d(7)
        self.latent = nn.Linear(channels * 7 * 7, self.feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.latent(self.pool(self.features(x)).flatten(1))


def _builtin(name: str) -> list[str]:
    """The names that an encoder of a user's own may not have, as far as `name` is concerned."""
    return [name] if name in ENCODERS or timm.is_model(name) else []


ENCODERS: dict[str, Callable[[int, int, int | None], nn.Module]] = {
    "conv": ConvEncoder,
    "resnet9": partial(ResNet9, width=64),
    "resnet9_small": partial(ResNet9, width=16),
    "vgg16_bn_embed": Vgg16BnEmbed,
}
"""The encoders of this package: name -> factory(in_channels, image_size, out_dim). All other names are timm's."""


def build_encoder(
    name: str,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    stem: str = "auto",
    out_dim: int | None = None,
    input_size: int | None = None,
    channels: Mapping[str, Sequence[int]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """An encoder with random weights: images [N, C, H, W] -> features [N, feature_dim].

    The stem is the part before the first block, which downsamples the image. Attributes of the encoder: `feature_dim`
    (int); `stem_kind`, "small" or "standard", or "own" for encoders with only one stem; `output_layers`, the names of
    the layers that map to `out_dim` (none where `out_dim` is None). A timm encoder is timm's module. With the
    standard stem, its state dict fits `timm.create_model(name, num_classes=out_dim or 0, in_chans=in_channels)`.

    Args:
        name: a key of ENCODERS, any name in `timm.list_models()`, or that of an encoder of a user's own (see
            own_encoder.py).
        in_channels: the images' channels, 1..64.
        image_size: side of the square images in px.
        stem: "small" (a 3x3 convolution of stride 1, no max-pool), "standard" (the architecture's, made for 224 px)
            or "auto", which is small for images up to 64 px. timm's ResNets and DenseNets have both (see
            `has_both_stems`); other encoders accept only "auto".
        out_dim: size of the features, which is the width of timm's classifier layer or of `latent`. None: the
            architecture's own.
        input_size: px. The encoder resizes the images to it, and its stem and smallest size depend on it in place
            of `image_size`.
        channels: layers that are narrower than the architecture's, as pruning leaves them; see `set_widths`.
        options: further arguments of an encoder of a user's own.

    Raises:
        ConfigError: unknown name or stem, images that the encoder cannot take, a stem that it does not have, or
            channels that do not fit.
    """
    size = input_size or image_size
    if stem not in STEMS:
        raise ConfigError("model.stem: " + unknown_name("stem", stem, STEMS))
    encoder: Any
    check_no_shadow("encoders", name, _builtin(name))
    own = None if name in ENCODERS else find("encoders", name, _builtin(name))
    if (name in ENCODERS or own is not None) and stem != "auto":
        raise only_its_own_stem(name, stem)
    if name in ENCODERS:
        encoder = ENCODERS[name](in_channels, size, out_dim)
        encoder.stem_kind, encoder.output_layers = "own", ("latent",)
    elif own is not None:
        encoder = build_own_encoder(own, in_channels, size, out_dim, options)
    elif name in timm.list_models():
        encoder = build_timm_encoder(name, in_channels, size, stem, out_dim)
    else:
        every, listed = [*ENCODERS, *timm.list_models()], f"{', '.join(ENCODERS)}, and all of timm.list_models()"
        raise ConfigError("model.encoder: " + unknown_name("encoder", name, every, listed=listed))
    if input_size is not None:
        resize_inputs(encoder, input_size)
    if channels:
        set_widths(encoder, channels)
    return encoder


def check_sizes(encoder: nn.Module, name: str, in_channels: int, sizes: Sequence[int]) -> None:
    """Raise ConfigError where an encoder that was built cannot take square images of one of these sizes in px."""
    for size in sizes:
        try:
            feature_dim_at(encoder, in_channels, size)
        except Exception as error:  # of any type: the model does not accept this size
            raise ConfigError(
                f"model.encoder={name} cannot take local views of {size} px beside global ones of {max(sizes)} px: "
                f"{first_line(error)}; change augment.local.image_size, or use another encoder"
            ) from None
