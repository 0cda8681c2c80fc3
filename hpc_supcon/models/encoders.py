"""Encoders by name: `encoder(x [N, C, H, W]) -> [N, feature_dim]`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from torch import Tensor, nn

from ..errors import ConfigError, unknown_name

SMALL_STEM_UP_TO = 64  # px; the 7x7 stride-2 stem and max-pool leave too little of smaller images


def _conv_bn_relu(c_in: int, c_out: int, *, stride: int = 1, pool: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)]
    if pool:  # before the norm: four times fewer values to normalise, the same maximum
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
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv_bn_relu(channels, channels), *_conv_bn_relu(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResNet9(nn.Module):
    """Nine-layer residual network for images of 32 px (after David Page's DAWNBench entry, 2018).

    `width` is the first layer's channels: 64 is the original; 16 trains on two CPU cores in minutes.
    """

    def __init__(self, in_channels: int, image_size: int, out_dim: int | None, *, width: int) -> None:
        super().__init__()
        if image_size < 16:
            raise ConfigError(f"resnet9 halves the image three times: it takes 16 px or more, not {image_size}")
        w = width
        self.feature_dim = out_dim or 8 * w
        self.layers = nn.Sequential(
            *_conv_bn_relu(in_channels, w),
            *_conv_bn_relu(w, 2 * w, pool=True),
            _Residual(2 * w),
            *_conv_bn_relu(2 * w, 4 * w, pool=True),
            *_conv_bn_relu(4 * w, 8 * w, pool=True),
            _Residual(8 * w),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.latent = nn.Linear(8 * w, out_dim) if out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.latent(self.layers(x))


def _resnet(name: str, in_channels: int, image_size: int, out_dim: int | None, *, small_stem: bool) -> nn.Module:
    model: Any = timm.create_model(name, pretrained=False, num_classes=out_dim or 0, in_chans=in_channels)
    if small_stem:  # SimCLR, appendix B.9: 3x3 stride 1 in place of 7x7 stride 2, no max-pool
        model.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    model.feature_dim = out_dim or model.num_features
    return model


# name -> (factory(in_channels, image_size, out_dim, [small_stem]), whether it has the two stems)
ENCODERS: dict[str, tuple[Callable[..., nn.Module], bool]] = {
    "conv": (ConvEncoder, False),
    "resnet9": (partial(ResNet9, width=64), False),
    "resnet9_small": (partial(ResNet9, width=16), False),
    **{name: (partial(_resnet, name), True) for name in ("resnet18", "resnet34", "resnet50", "resnet101")},
}


def build_encoder(
    name: str, *, in_channels: int = 3, image_size: int = 32, stem: str = "auto", out_dim: int | None = None
) -> nn.Module:
    """A freshly initialised encoder with `feature_dim` and `stem` ("small", "standard" or "own").

    Args:
        name: a key of ENCODERS.
        in_channels: 1 or 3, the images' channels.
        image_size: side of the square images in px.
        stem: "small" (3x3, stride 1, no max-pool), "standard" (the 224 px one) or "auto": small up to 64 px.
        out_dim: size of the features through one more linear layer; None keeps the encoder's own.

    Raises:
        ConfigError: unknown name or stem, an image too small, a stem asked of an encoder that has only its own.
    """
    if name not in ENCODERS:
        raise ConfigError("model.encoder: " + unknown_name("encoder", name, ENCODERS))
    if stem not in ("auto", "small", "standard"):
        raise ConfigError("model.stem: " + unknown_name("stem", stem, ["auto", "small", "standard"]))
    factory, has_stems = ENCODERS[name]
    if not has_stems:
        if stem != "auto":
            raise ConfigError(f"model.stem={stem}: {name} has only its own stem; leave it at auto")
        encoder: Any = factory(in_channels, image_size, out_dim)
        encoder.stem = "own"
        return encoder
    small = stem == "small" or (stem == "auto" and image_size <= SMALL_STEM_UP_TO)
    encoder = factory(in_channels, image_size, out_dim, small_stem=small)
    encoder.stem = "small" if small else "standard"
    return encoder
