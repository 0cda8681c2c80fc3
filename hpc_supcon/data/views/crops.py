"""What part of an image a view shows: a resized crop, a square of the padded image, or the whole image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...errors import ConfigError
from ..crop_boxes import draw_boxes, draw_padded_boxes
from .pixels import copy_async, cut_windows, flip_selected, planes_of, resample


class Crops:
    """Boxes of random crops, and the pixels in them as squares of one size."""

    def __init__(
        self,
        image_size: int,
        policy: str,
        crop: Literal["auto", "resized", "padded"],
        padding: int,
        padding_mode: Literal["zeros", "reflect"],
        scale: tuple[float, float],
        ratio: tuple[float, float],
    ) -> None:
        """image_size: side of the views in pixels. policy: none shows the whole image, resized. Others: see Views."""
        self.image_size, self.random, self.scale, self.ratio = image_size, policy != "none", scale, ratio
        padded = self.random and (crop == "padded" or (crop == "auto" and policy == "pad_crop"))
        self.padding = padding if padded else None
        self.outside = padding_mode if padded else None

    def draw(self, n: int, height: int, width: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """int64 [n, 4] on `device`, where `generator` is: boxes in images of this size. Raises ConfigError."""
        if self.padding is not None:
            if self.outside == "reflect" and self.padding >= min(height, width):
                raise ConfigError(
                    f"augment.padding={self.padding} mirrors more than images of {height}x{width} pixels have"
                )
            return draw_padded_boxes(
                n, height, width, self.image_size, self.padding, generator=generator, device=device
            )
        if self.random:
            return draw_boxes(
                n, height, width, scale=self.scale, ratio=self.ratio, generator=generator, device=device
            )
        return copy_async(torch.tensor([0, 0, height, width]), device).expand(n, 4)

    def cut(self, images: Tensor, boxes: Tensor, flip: Tensor) -> Tensor:
        """uint8 [n, C, H, W] -> float32 [C, n, S, S] in 0..1: the box of each image, mirrored where `flip`.

        boxes: int64 [n, 4], on the device of the images; flip: bool [n], on the CPU.
        """
        if self.padding is not None and self.outside is not None:
            windows = cut_windows(images, boxes, self.image_size, self.padding, self.outside)
            return planes_of(flip_selected(windows, torch.arange(len(flip)), flip))
        flip = copy_async(flip, images.device)
        return resample(images, boxes.unsqueeze(1), flip.unsqueeze(1), self.image_size).squeeze(2)
