"""AutoAugment and RandAugment: the operations of each view, drawn for a whole batch.

Both draw like torchvision.transforms.v2's AutoAugment and RandAugment with their default settings. The
operations themselves are in ops.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import ConfigError, unknown_name
from ..levels import PICTURE_CHANNELS, dtype_of, is_picture
from .ops import OPERATIONS

# One sub-policy per line: operation, probability, magnitude (0..9; absent for operations without a magnitude).
# AutoAugment (Cubuk et al. 2019, arXiv:1805.09501), tables 7 to 9 as torchvision has them.
_AUTOAUGMENT = {
    "cifar10": """
        Invert 0.1, Contrast 0.2 6
        Rotate 0.7 2, TranslateX 0.3 9
        Sharpness 0.8 1, Sharpness 0.9 3
        ShearY 0.5 8, TranslateY 0.7 9
        AutoContrast 0.5, Equalize 0.9
        ShearY 0.2 7, Posterize 0.3 7
        Color 0.4 3, Brightness 0.6 7
        Sharpness 0.3 9, Brightness 0.7 9
        Equalize 0.6, Equalize 0.5
        Contrast 0.6 7, Sharpness 0.6 5
        Color 0.7 7, TranslateX 0.5 8
        Equalize 0.3, AutoContrast 0.4
        TranslateY 0.4 3, Sharpness 0.2 6
        Brightness 0.9 6, Color 0.2 8
        Solarize 0.5 2, Invert 0
        Equalize 0.2, AutoContrast 0.6
        Equalize 0.2, Equalize 0.6
        Color 0.9 9, Equalize 0.6
        AutoContrast 0.8, Solarize 0.2 8
        Brightness 0.1 3, Color 0.7 0
        Solarize 0.4 5, AutoContrast 0.9
        TranslateY 0.9 9, TranslateY 0.7 9
        AutoContrast 0.9, Solarize 0.8 3
        Equalize 0.8, Invert 0.1
        TranslateY 0.7 9, AutoContrast 0.9
    """,
    "imagenet": """
        Posterize 0.4 8, Rotate 0.6 9
        Solarize 0.6 5, AutoContrast 0.6
        Equalize 0.8, Equalize 0.6
        Posterize 0.6 7, Posterize 0.6 6
        Equalize 0.4, Solarize 0.2 4
        Equalize 0.4, Rotate 0.8 8
        Solarize 0.6 3, Equalize 0.6
        Posterize 0.8 5, Equalize 1
        Rotate 0.2 3, Solarize 0.6 8
        Equalize 0.6, Posterize 0.4 6
        Rotate 0.8 8, Color 0.4 0
        Rotate 0.4 9, Equalize 0.6
        Equalize 0, Equalize 0.8
        Invert 0.6, Equalize 1
        Color 0.6 4, Contrast 1 8
        Rotate 0.8 8, Color 1 2
        Color 0.8 8, Solarize 0.8 7
        Sharpness 0.4 7, Invert 0.6
        ShearX 0.6 5, Equalize 1
        Color 0.4 0, Equalize 0.6
        Equalize 0.4, Solarize 0.2 4
        Solarize 0.6 5, AutoContrast 0.6
        Invert 0.6, Equalize 1
        Color 0.6 4, Contrast 1 8
        Equalize 0.8, Equalize 0.6
    """,
    "svhn": """
        ShearX 0.9 4, Invert 0.2
        ShearY 0.9 8, Invert 0.7
        Equalize 0.6, Solarize 0.6 6
        Invert 0.9, Equalize 0.6
        Equalize 0.6, Rotate 0.9 3
        ShearX 0.9 4, AutoContrast 0.8
        ShearY 0.9 8, Invert 0.4
        ShearY 0.9 5, Solarize 0.2 6
        Invert 0.9, AutoContrast 0.8
        Equalize 0.6, Rotate 0.9 3
        ShearX 0.9 4, Solarize 0.3 3
        ShearY 0.8 8, Invert 0.7
        Equalize 0.9, TranslateY 0.6 6
        Invert 0.9, Equalize 0.6
        Contrast 0.3 3, Rotate 0.8 4
        Invert 0.8, TranslateY 0 2
        ShearY 0.7 6, Solarize 0.4 8
        Invert 0.6, Rotate 0.8 4
        ShearY 0.3 7, TranslateX 0.9 3
        ShearX 0.1 6, Invert 0.6
        Solarize 0.7 2, TranslateY 0.6 7
        ShearY 0.8 4, Invert 0.8
        ShearX 0.7 9, TranslateY 0.8 3
        ShearY 0.8 5, AutoContrast 0.7
        ShearX 0.7 2, Invert 0.1
    """,
}
AUTOAUGMENT_NAMES = tuple(_AUTOAUGMENT)

_AUTOAUGMENT_LEVELS, _RANDAUGMENT_LEVELS = 10, 31
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")
"""Operations whose magnitude is negated with probability 1/2."""


def magnitude(operation: str, level: int, levels: int, height: int, width: int) -> float:
    """Magnitude of `level`, 0..levels-1, for an operation on images of this size in pixels (see ops.OPERATIONS)."""
    if operation == "Posterize":
        return float((8 - torch.arange(levels) / ((levels - 1) / 4)).round()[level])
    last = {
        "ShearX": 0.3,
        "ShearY": 0.3,
        "TranslateX": 150 / 331 * width,
        "TranslateY": 150 / 331 * height,
        "Rotate": 30.0,
        "Brightness": 0.9,
        "Color": 0.9,
        "Contrast": 0.9,
        "Sharpness": 0.9,
    }
    if operation == "Solarize":
        return float(torch.linspace(1, 0, levels)[level])
    # float32, as torchvision computes them: a pixel may depend on the last bit
    return float(torch.linspace(0, last[operation], levels)[level]) if operation in last else 0.0


def check_policy(policy: str, channels: int, bits: int) -> None:
    """Raise ConfigError for operations that are not defined for images of these channels and bits per channel."""
    if policy in ("autoaugment", "randaugment") and not is_picture(channels, dtype_of(bits)):
        raise ConfigError(
            f"augment.policy={policy} changes 8-bit images of 1 or 3 channels, but these have {channels} of {bits} "
            "bits: use flip_crop, pad_crop or simaugment"
        )
    if policy not in POLICIES and bits != 8:
        raise ConfigError(f"augment.policy={policy}: policies of your own change 8-bit views, but images have {bits}")


def left_out(policy: str, channels: int) -> str:
    """A line about what such images do not get of the policy; empty where they get all that gray or RGB ones do.

    Brightness, contrast and gray scale or mix all channels alike, as is sensible for those of one camera. Other bands
    have units of their own, in which classes differ, so none of it is applied to them.
    """
    if policy == "simaugment" and channels not in PICTURE_CHANNELS:
        return f"augment.policy=simaugment: no color jitter and no gray views, for images of {channels} channels"
    return ""


class AutoAugment:
    """One of 25 pairs of operations per view, each operation applied with its own probability."""

    steps = 2

    def __init__(self, name: str) -> None:
        """name: cifar10, imagenet or svhn. Raises ConfigError for another one."""
        if name not in _AUTOAUGMENT:
            raise ConfigError(unknown_name("augment.autoaugment", name, AUTOAUGMENT_NAMES))
        lines = [line.split(",") for line in _AUTOAUGMENT[name].strip().splitlines()]
        self.policies = tuple(tuple(_parse(entry) for entry in line) for line in lines)
        """Pairs of (operation, probability, level or None)."""

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Operations int64 [n, 2] and magnitudes float64 [n, 2] for views of this size in pixels."""
        operations, probabilities, magnitudes = (
            torch.tensor([[row[k] for row in pair] for pair in self._numbers(height, width)], dtype=dtype)
            for k, dtype in enumerate((torch.int64, torch.float32, torch.float64))
        )
        pair = torch.randint(len(self.policies), (n,), generator=generator)
        chance = torch.rand(2, n, self.steps, generator=generator)
        chosen = torch.where(chance[0] <= probabilities[pair], operations[pair], 0)
        return chosen, _signed(chosen, magnitudes[pair], chance[1])

    def _numbers(self, height: int, width: int) -> list[list[tuple[int, float, float]]]:
        return [
            [
                (OPERATIONS.index(name), p, magnitude(name, level or 0, _AUTOAUGMENT_LEVELS, height, width))
                for name, p, level in pair
            ]
            for pair in self.policies
        ]


class RandAugment:
    """Several operations per view, all of one magnitude (Cubuk et al. 2020, arXiv:1909.13719)."""

    choices = tuple(name for name in OPERATIONS if name != "Invert")

    def __init__(self, operations: int = 2, magnitude: int = 9) -> None:
        """operations: their number, >= 0. magnitude: 0..30. Raises ConfigError outside these ranges."""
        if operations < 0:
            raise ConfigError(f"augment.randaugment.operations must be at least 0, not {operations}")
        if not 0 <= magnitude < _RANDAUGMENT_LEVELS:
            raise ConfigError(
                f"augment.randaugment.magnitude must be within 0..{_RANDAUGMENT_LEVELS - 1}, not {magnitude}"
            )
        self.steps, self.level = operations, magnitude

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Operations int64 [n, steps] and magnitudes float64 [n, steps] for views of this size in pixels."""
        numbers = [magnitude(name, self.level, _RANDAUGMENT_LEVELS, height, width) for name in self.choices]
        codes = torch.tensor([OPERATIONS.index(name) for name in self.choices])
        choice = torch.randint(len(codes), (n, self.steps), generator=generator)
        chance = torch.rand(n, self.steps, generator=generator)
        return codes[choice], _signed(codes[choice], torch.tensor(numbers, dtype=torch.float64)[choice], chance)


POLICIES: dict[str, Callable[..., AutoAugment | RandAugment | None]] = {
    "none": lambda **_: None,
    "flip_crop": lambda **_: None,
    "pad_crop": lambda **_: None,
    "simaugment": lambda **_: None,
    "autoaugment": lambda *, autoaugment, **_: AutoAugment(autoaugment),
    "randaugment": lambda *, randaugment, **_: RandAugment(**randaugment),
}
"""`augment.policy` -> the operations it adds to crop and flip, if any."""


def _signed(operations: Tensor, magnitudes: Tensor, chance: Tensor) -> Tensor:
    signed = torch.isin(operations, torch.tensor([OPERATIONS.index(name) for name in SIGNED]))
    return torch.where(signed & (chance <= 0.5), -magnitudes, magnitudes)


def _parse(entry: str) -> tuple[str, float, int | None]:
    name, probability, *level = entry.split()
    return name, float(probability), int(level[0]) if level else None
