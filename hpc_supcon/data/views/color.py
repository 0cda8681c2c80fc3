"""Color jitter, grayscale, Gaussian blur and solarization of a batch, with a factor for each image.

Images are float32 [C, N, H, W] in 0..1, channels first: hue and grayscale mix channels, and are fastest on whole
planes. Factors are float32 [N]. `blend` and `adjust_hue` work IN PLACE and return their argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError
from ..sources.source import LUMA
from .pixels import copy_async

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Operations, numbered as in torchvision's ColorJitter."""

PerView = float | Sequence[float]
"""A probability for all views, or one for each."""
SIGMA = (0.1, 2.0)
"""Range of the blur's standard deviation in pixels, as SimCLR draws it (Chen et al. 2020, appendix A)."""


def blend(x: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """x * factor + (1 - factor) * target, clamped to 0..1, with a target per image.

    operation: int64 [N]. BRIGHTNESS blends with black, CONTRAST with the image's mean gray, SATURATION with its
    gray. factor: float32 [N], >= 0; 1 changes nothing. One function for all three, so that images whose operations
    come in different orders can be processed together.
    """
    rest = _per_image(1 - factor)
    shade = grayscale(x)
    mean = shade.mean(dim=(-2, -1), keepdim=True).mul_(rest * _per_image(operation == CONTRAST))
    target = torch.addcmul(mean, shade, rest * _per_image(operation == SATURATION))
    return torch.addcmul(target, x, _per_image(factor), out=x).clamp_(0, 1)


def adjust_hue(x: Tensor, factor: Tensor) -> Tensor:
    """Shift the hue by `factor` turns, -0.5..0.5, as torchvision's adjust_hue. Needs 3 channels.

    Through HSV, without branching on its six sectors: comparing and choosing takes a CPU ten times as long as
    arithmetic. Channel c of a hue h (in turns) is high - (high - low) * w_c, where w_c = clamp(2 - 6 |h - o_c|, 0, 1)
    with o_c the hue opposite to c, around the circle. So |6 h| = 2 + w_red - w_green - w_blue for h within
    -1/2..1/2, and h has the sign of green - blue.
    """
    red, green, blue = x
    high = torch.maximum(red, green)
    torch.maximum(high, blue, out=high)
    spread = torch.minimum(red, green)
    torch.minimum(spread, blue, out=spread)
    torch.sub(high, spread, out=spread)
    # where the spread is 0, so is the numerator, and any hue gives the same color
    turn = (green + blue).sub_(red).sub_(high).div_((spread * 6).clamp_(min=1e-30)).add_(2 / 6)
    turn.copysign_(green - blue).add_(_per_image(factor)[0])
    # 1/2 + h - o_c plus whole turns, so that it is positive: frac_ truncates towards zero
    offset = 2 - torch.arange(3, dtype=x.dtype, device=x.device).view(3, 1, 1, 1) / 3
    weight = (turn + offset).frac_().sub_(0.5).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(high, weight, spread, value=-1, out=x)


def grayscale(x: Tensor) -> Tensor:
    """float32 [1, N, H, W], new: the luminance, or a copy of the only channel."""
    if x.shape[0] == 1:
        return x.clone()
    return (x[0] * LUMA[0]).add_(x[1], alpha=LUMA[1]).add_(x[2], alpha=LUMA[2]).unsqueeze(0)


def kernel_size(image_size: int) -> int:
    """Odd side of the kernel in pixels: a tenth of the image's, as SimCLR's, and at least 3."""
    return max(3, image_size // 10 | 1)


def gaussian_blur(x: Tensor, sigma: Tensor, size: int) -> Tensor:
    """float32 [C, n, H, W] -> the same shape, new, blurred with a standard deviation sigma [n] > 0 in pixels.

    size: side of the kernel, odd; H and W must be larger than size // 2, the width of the reflected padding.
    Equal to torchvision's gaussian_blur per image. A sum of shifted copies: a convolution with as many groups as
    planes is slower on the CPU and would run in TF32 on CUDA.
    """
    radius = size // 2
    offset = torch.arange(-radius, radius + 1, dtype=torch.float32, device=x.device) / math.sqrt(2)
    weights = torch.softmax((offset / sigma[:, None]).square_().neg_(), dim=1)  # [n, size]
    for axis in (3, 2):
        padding = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
        padded = F.pad(x, padding, mode="reflect")
        length = x.shape[axis]
        x = padded.narrow(axis, radius, length) * _per_image(weights[:, radius])
        for distance in range(1, radius + 1):
            both = padded.narrow(axis, radius - distance, length) + padded.narrow(axis, radius + distance, length)
            x.addcmul_(both, _per_image(weights[:, radius - distance]))
    return x


def change_(x: Tensor, chosen: Tensor, operation: Callable[[Tensor], Tensor]) -> None:
    """Replace the chosen images (bool [N], on the CPU) of x [C, N, H, W] by what `operation` makes of them."""
    rows = torch.where(chosen)[0]
    if len(rows):
        device_rows = copy_async(rows, x.device)
        x.index_copy_(1, device_rows, operation(x.index_select(1, device_rows)))


def draw_sigma(probability: Tensor, generator: torch.Generator) -> Tensor:
    """float32 [n]: standard deviations of blurs in pixels, drawn from SIGMA with these probabilities [n], else 0."""
    chance, where = torch.rand(2, len(probability), generator=generator)
    return torch.where(chance < probability, where * (SIGMA[1] - SIGMA[0]) + SIGMA[0], torch.zeros(()))


def solarize(x: Tensor) -> Tensor:
    """float32 in 0..1 -> the same shape, new: 1 - x from one half on (Grill et al. 2020, BYOL, appendix B)."""
    return torch.where(x < 0.5, x, 1 - x)


def _per_image(value: Tensor) -> Tensor:
    return value.view(1, -1, 1, 1)


class Jitter(nn.Module):
    """Brightness, contrast, saturation and hue in a random order, as torchvision's ColorJitter does per image."""

    factor_range: Tensor
    """float32 [2, 4]: lowest and highest factor of each operation."""
    sequences: Tensor
    """int64 [len(permutations) + 1, 4]: the operations of each permutation, -1 for none; row -1 has none at all."""

    def __init__(self, strengths: tuple[float, float, float, float], probability: float) -> None:
        """strengths: of brightness, contrast, saturation (>= 0) and hue (0..0.5 turns); 0 omits the operation.

        Factors are drawn from max(0, 1 - x)..1 + x, the hue from -x..x. probability: that a view is jittered.
        """
        super().__init__()
        low = [max(0.0, 1 - s) for s in strengths[:3]] + [-strengths[3]]
        high = [1 + s for s in strengths[:3]] + [strengths[3]]
        self.register_buffer("factor_range", torch.tensor([low, high]), persistent=False)
        active = [k for k, strength in enumerate(strengths) if strength > 0]
        self.permutations = tuple(permutations(active)) if active else ()
        sequences = torch.tensor([[*p, *[-1] * (4 - len(p))] for p in self.permutations] + [[-1] * 4])
        self.register_buffer("sequences", sequences, persistent=False)
        self.has_hue = HUE in active
        self.probability = probability if active else 0.0
        # On the CPU, which launches the operations: for each permutation the position of the hue, and its blends.
        self._hue_position = torch.tensor([p.index(HUE) if self.has_hue else 0 for p in self.permutations])
        blends = [[k for k in p if k != HUE] for p in self.permutations]
        self._blends = torch.tensor(blends, dtype=torch.int64)

    def draw(self, chance: Tensor, decisions: torch.Generator, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
        """Factors float32 [n, 4], on the device, and int64 [n], on the CPU: an index into `permutations` or -1.

        chance: [n], uniform in 0..1, on the CPU. decisions: a generator of the CPU; numbers: one of the device.
        """
        n, (low, high) = len(chance), self.factor_range
        factors = torch.rand(n, 4, generator=numbers, device=low.device) * (high - low) + low
        permutation = torch.randint(max(len(self.permutations), 1), (n,), generator=decisions)
        return factors, torch.where(chance < self.probability, permutation, -1)

    def groups(self, permutation: Tensor) -> list[Tensor]:
        """Rows int64 [k] of the views that are processed together; each view is in one group. permutation: [n], CPU.

        A group has one position of the hue. The operations before and after it are blends, whatever their order.
        """
        position = torch.where(permutation < 0, -1, self._hue_position[permutation])
        rows = torch.argsort(position, stable=True)
        return [group for group in rows.split(torch.bincount(position + 1).tolist()) if len(group)]

    def forward(self, x: Tensor, factors: Tensor, permutation: Tensor) -> Tensor:
        """x float32 [C, n, S, S] in 0..1, views of one group, jittered in place; permutation: [n], CPU."""
        if permutation[0] < 0:
            return x
        hue_position = int(self._hue_position[permutation[0]])
        blends = copy_async(self._blends[permutation], x.device)
        blend_factors = factors.gather(1, blends)
        for step in range(blends.shape[1] + 1):
            if self.has_hue and step == hue_position:
                adjust_hue(x, factors[:, HUE])
            if step < blends.shape[1]:
                blend(x, blends[:, step], blend_factors[:, step])
        return x


def per_view(name: str, probability: PerView, count: int) -> Tensor:
    """float32 [count], of one probability for all views or of one for each. Raises ConfigError."""
    each = list(probability) if isinstance(probability, Sequence) else [probability] * count
    if len(each) != count:
        raise ConfigError(
            f"augment.{name} has {len(each)} probabilities for {count} views: give one, or one for each"
        )
    for value in each:
        check_probabilities(**{name: value})
    return torch.tensor(each, dtype=torch.float32)


def check_probabilities(**probabilities: float) -> None:
    """Raise ConfigError for a value outside 0..1."""
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is a probability and must be within 0..1, not {value}")


def check_strengths(**strengths: float) -> None:
    """Raise ConfigError for a strength of the color jitter below 0, or a hue above 0.5."""
    for name, value in strengths.items():
        if not 0 <= value <= (0.5 if name == "hue" else float("inf")):
            raise ConfigError(f"{name} must be at least 0{' and at most 0.5' * (name == 'hue')}, not {value}")
