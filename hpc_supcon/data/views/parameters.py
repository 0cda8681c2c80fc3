"""What is drawn for augmented views, and from which ranges it may be."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import ConfigError


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for n = B * V views (the V views of an image side by side).

    Numbers are on the device of the views. What is done to which view is on the CPU, where it is decided what
    runs: asking a GPU would mean to wait until it has done all that was queued before.
    """

    boxes: Tensor
    """int64 [n, 4], on the device: top, left, height, width of the crop."""
    factors: Tensor
    """float32 [n, 4], on the device: brightness, contrast, saturation (factors >= 0) and hue (turns)."""
    flip: Tensor
    """bool [n]: mirrored left to right."""
    order: Tensor
    """int64 [n]: which of Views.orders the color operations are applied in; -1 for none of them."""
    grayscale: Tensor
    """bool [n]: made gray, after the color operations."""
    sigma: Tensor
    """float32 [n]: standard deviation of the blur in pixels; 0 for none."""
    operations: Tensor
    """int64 [n, steps]: operations of AutoAugment or RandAugment (indices into ops.OPERATIONS), in sequence."""
    magnitudes: Tensor
    """float64 [n, steps]: their magnitudes (see ops.OPERATIONS)."""

    def select(self, rows: slice) -> ViewParameters:
        """Those of some of the views."""
        return ViewParameters(**{name: value[rows] for name, value in vars(self).items()})


def check_ranges(
    count: int, image_size: int, crop_scale: tuple[float, float], crop_ratio: tuple[float, float]
) -> None:
    if count < 1 or image_size < 1:
        raise ConfigError(f"views need count >= 1 and image_size >= 1, not {count} and {image_size}")
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ConfigError(f"crop_scale must be an increasing pair within (0, 1], not {crop_scale}")
    if not 0 < crop_ratio[0] <= crop_ratio[1]:
        raise ConfigError(f"crop_ratio must be an increasing pair of positive numbers, not {crop_ratio}")


def check_probabilities(**probabilities: float) -> None:
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is a probability, not {value}")


def check_strengths(**strengths: float) -> None:
    for name, value in strengths.items():
        if not 0 <= value <= (0.5 if name == "hue" else float("inf")):
            raise ConfigError(f"{name} must be at least 0{' and at most 0.5' * (name == 'hue')}, not {value}")
