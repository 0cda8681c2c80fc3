"""The decoder that mirrors the `conv` encoder."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ConfigError


class ConvDecoder(nn.Module):
    """The conv encoder, mirrored: a linear layer, transposed convolutions 128-64-32 (BatchNorm, ReLU), tanh.

    features [N, D] -> images [N, C, S, S] in -1..1.
    """

    def __init__(self, feature_dim: int, channels: int, image_size: int) -> None:
        super().__init__()
        sides = [image_size]
        for _ in range(3):
            sides.append((sides[-1] + 1) // 2)
        self.side = sides[3]
        self.latent = nn.Linear(feature_dim, 128 * self.side**2)
        layers: list[nn.Module] = []
        for c_in, c_out, side in ((128, 64, sides[2]), (64, 32, sides[1]), (32, channels, sides[0])):
            # a stride-2 convolution maps 2s - 1 and 2s to s: the padding says which of them to go back to
            layers.append(nn.ConvTranspose2d(c_in, c_out, 3, 2, 1, output_padding=1 - side % 2))
            layers += [nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)] if c_out != channels else [nn.Tanh()]
        self.convs = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.ConvTranspose2d):
                # PyTorch takes the outputs of a transposed convolution for its inputs: with one grey channel the last
                # layer starts so large that pixels saturate behind the tanh and stay white
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        return self.convs(self.latent(features).unflatten(1, (128, self.side, self.side)))


def build_decoder(encoder_name: str, feature_dim: int, channels: int, image_size: int) -> nn.Module:
    """The decoder of an encoder. Raises ConfigError where there is none."""
    if encoder_name != "conv":
        raise ConfigError(
            f"model.encoder={encoder_name} has no decoder, which the reconstruction loss needs; use conv"
        )
    return ConvDecoder(feature_dim, channels, image_size)
