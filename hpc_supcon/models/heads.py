"""Heads, which take an encoder's features: projection, decoder, and the classifiers of evaluation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError

NORMS = ("none", "hidden", "all")
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Projection(nn.Module):
    """Linear layers with a ReLU between them; the output rows have unit length: [N, in_dim] -> [N, out_dim] fp32.

    SimCLR (Chen et al. 2020, section 2.1) and SupCon (Khosla et al. 2020, section 3.1). `layers`: 2 or more. `norm`:
    BatchNorm after every layer but the last ("hidden"), or after the last as well ("all", there without weights, as
    in SimSiam). `activation`: relu, or gelu, with the initial weights of DINO's head (Caron et al. 2021, appendix C):
    a truncated normal distribution of std 0.02, biases 0. `unit`: scale the rows to unit length.
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int,
        out_dim: int,
        layers: int = 2,
        norm: str = "none",
        activation: str = "relu",
        *,
        unit: bool = True,
    ) -> None:
        super().__init__()
        assert norm in NORMS
        self.unit = unit
        self.hidden = nn.Linear(in_dim, hidden)
        parts = _activation(hidden, norm, activation)
        for _ in range(layers - 2):
            parts += [nn.Linear(hidden, hidden), *_activation(hidden, norm, activation)]
        self.middle = nn.Sequential(*parts)
        self.out = nn.Linear(hidden, out_dim)
        self.last = nn.BatchNorm1d(out_dim, affine=False) if norm == "all" else nn.Identity()
        if activation == "gelu":
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.02)
                    nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        z = self.last(self.out(self.middle(self.hidden(features))))
        z = z if z.dtype == torch.float64 else z.float()
        return F.normalize(z, dim=1) if self.unit else z


def _activation(width: int, norm: str, activation: str) -> list[nn.Module]:
    function = ACTIVATIONS[activation]()
    return [function] if norm == "none" else [nn.BatchNorm1d(width), function]


class Predictor(nn.Module):
    """Predicts embeddings of other views: a linear layer, BatchNorm, ReLU, a linear layer; [N, dim] -> [N, dim] fp32.

    BYOL (Grill et al. 2020, section 3.3) and SimSiam (Chen and He 2021, section 3).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, embeddings: Tensor) -> Tensor:
        p: Tensor = self.layers(embeddings)
        return p if p.dtype == torch.float64 else p.float()


class Mlp(nn.Sequential):
    """A classifier with hidden layers: [N, in_dim] -> logits [N, classes].

    Each hidden layer is linear, BatchNorm (with `batch_norm`), ReLU, dropout (if not 0); the last layer is linear.
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

    The cross-entropy of logits (0, z) is the binary cross-entropy of sigmoid(z), so that cross-entropy is the loss of
    all classifiers. The weights are initialized with zeros: the loss is convex.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.linear(x), (1, 0))


class Heads(Protocol):
    """K independent classifiers that are trained at the same time: inputs [N, D] -> logits [K, N, classes]."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def head_parameters(self, k: int) -> list[nn.Parameter]:
        """The parameters of head k: each head may have its own optimizer settings."""
        ...

    def one(self, k: int) -> nn.Module:
        """A copy of head k as a module of its own, for evaluation: [N, D] -> [N, classes]."""
        ...

    def train(self, mode: bool = True) -> nn.Module: ...


class LinearHeads(nn.Module):
    """`Heads` of one linear layer each, computed in one matrix product instead of K small ones."""

    def __init__(self, heads: int, in_dim: int, classes: int) -> None:
        super().__init__()
        # Zeros, because the loss is convex, and so that heads differ only by their optimizer settings.
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
    """`Heads` with K = 1: any classifier [N, D] -> [N, classes]."""

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
            # a stride-2 convolution maps both 2s - 1 and 2s to s: the output padding selects the right one
            layers.append(nn.ConvTranspose2d(c_in, c_out, 3, 2, 1, output_padding=1 - side % 2))
            layers += [nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        layers[-2:] = [nn.Tanh()]  # of the images
        self.convs = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.ConvTranspose2d):
                # PyTorch's default counts the output channels of a transposed convolution as its inputs: with one
                # gray channel the last layer's weights become so large that the tanh saturates and pixels stay white
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        return self.convs(self.latent(features).unflatten(1, (128, self.side, self.side)))


def build_decoder(encoder_name: str, feature_dim: int, channels: int, image_size: int) -> nn.Module:
    """The decoder for an encoder. Raises ConfigError for an encoder that has none."""
    if encoder_name != "conv":
        raise ConfigError(
            f"model.encoder={encoder_name} has no decoder, which the reconstruction loss needs; use conv"
        )
    return ConvDecoder(feature_dim, channels, image_size)
