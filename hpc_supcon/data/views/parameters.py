"""The random parameters of views, drawn before the views are computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ViewParameters:
    """Random parameters of n = B * V views (the V views of an image are adjacent).

    Numbers are on the device of the views. Which operation applies to which view is on the CPU, which launches the
    operations: reading it from a GPU would wait for everything that is queued there.
    """

    boxes: Tensor
    """int64 [n, 4], on the device: top, left, height, width of the crop."""
    factors: Tensor
    """float32 [n, 4], on the device: brightness, contrast, saturation (factors >= 0) and hue (turns)."""
    flip: Tensor
    """bool [n]: mirrored left to right."""
    permutation: Tensor
    """int64 [n]: the order of the color operations, an index into Jitter.permutations; -1 for no color operation."""
    grayscale: Tensor
    """bool [n]: converted to gray, after the color operations."""
    sigma: Tensor
    """float32 [n]: standard deviation of the blur in pixels; 0 for none."""
    solarize: Tensor
    """bool [n]: solarized, after the blur."""
    operations: Tensor
    """int64 [n, steps]: operations of AutoAugment or RandAugment (indices into ops.OPERATIONS), in sequence."""
    magnitudes: Tensor
    """float64 [n, steps]: their magnitudes (see ops.OPERATIONS)."""
    seeds: Tensor
    """int64 [n]: of which a policy of a user's own takes the first of those that it renders together; [n, 0] without
    one."""

    def select(self, rows: slice) -> ViewParameters:
        """The parameters of these views."""
        return ViewParameters(**{name: value[rows] for name, value in vars(self).items()})
