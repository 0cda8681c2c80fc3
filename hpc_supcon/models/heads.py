"""Heads on an encoder's features: projection, decoder, and the classifiers of evaluation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError


class Projection(nn.Module):
    """One hidden layer (ReLU), then rows of unit length in fp32: [N, in_dim] -> [N, out_dim].

    SimCLR (Chen et al. 2020, section 2.1) and SupCon (Khosla et al. 2020, section 3.1).
    """

    def __init__(self, in_dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_dim, hidden)
        self.out = nn.Linear(hidden, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        z = self.out(F.relu(self.hidden(features)))
        return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)


class Mlp(nn.Sequential):
    """A classifier with hidden layers: [N, in_dim] -> logits [N, classes].

    Each hidden layer is linear, BatchNorm (if wanted), ReLU, dropout (if not 0); the last layer is linear.
    """

    def __init__(self, in_dim: int, hidden: Sequence[int], classes: int, *, batch_norm: bool, dropout: float) -> None:
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(in_dim, width)]
            layers += [nn.BatchNorm1d(width)] if batch_norm else []
            layers += [nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
            in_dim = width
        super().__init__(*layers, nn.Linear(in_dim, classes))


class Logistic(nn.Module):
    """Binary logistic regression: [N, in_dim] -> logits [N, 2], of which the first is 0.

    Cross-entropy of (0, z) is the binary cross-entropy of sigmoid(z), so that one loss serves all classifiers.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.linear = zero_linear(in_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.linear(x), (1, 0))


def zero_linear(in_dim: int, classes: int) -> nn.Linear:
    """A linear layer that starts at zero: the losses put on it are convex, and no start is nearer."""
    layer = nn.Linear(in_dim, classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Heads(Protocol):
    """K classifiers trained side by side: inputs [N, D] -> logits [K, N, classes]; head k never sees the others."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def head_parameters(self, k: int) -> list[nn.Parameter]:
        """Those of head k, so that each can have its own optimizer settings."""
        ...

    def one(self, k: int) -> nn.Module:
        """A copy of head k by itself, for evaluation: [N, D] -> [N, classes]."""
        ...

    def train(self, mode: bool = True) -> nn.Module: ...


class LinearHeads(nn.Module):
    """Linear `Heads`: one product instead of K small ones."""

    def __init__(self, heads: int, in_dim: int, classes: int) -> None:
        super().__init__()
        # zeros: the loss is convex, and a fixed start makes the heads differ by learning rate alone
        self.weights = nn.ParameterList(torch.zeros(in_dim, classes) for _ in range(heads))
        self.biases = nn.ParameterList(torch.zeros(classes) for _ in range(heads))

    def head_parameters(self, k: int) -> list[nn.Parameter]:
        return [self.weights[k], self.biases[k]]

    def one(self, k: int) -> nn.Linear:
        weight, bias = (p.detach().clone() for p in self.head_parameters(k))
        layer = nn.Linear(*weight.shape).to(weight)
        layer.load_state_dict({"weight": weight.T, "bias": bias})
        return layer

    def forward(self, features: Tensor) -> Tensor:
        weight, bias = torch.cat(list(self.weights), dim=1), torch.cat(list(self.biases))
        return torch.addmm(bias, features, weight).unflatten(1, (len(self.weights), -1)).transpose(0, 1)


class SingleHead(nn.Module):
    """Any one classifier [N, D] -> [N, classes] as `Heads` with K = 1."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def head_parameters(self, k: int) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def one(self, k: int) -> nn.Module:
        return copy.deepcopy(self.head).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)[None]


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
                # PyTorch takes the outputs of a transposed convolution for its inputs: with one gray channel the last
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
