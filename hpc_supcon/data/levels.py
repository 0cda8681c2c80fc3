"""The levels of pixels: whole numbers of 8 or 16 bits, from 0 to full scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError

MAX_CHANNELS = 64
"""Channels of an image, at most."""
PICTURE_CHANNELS = (1, 3)
"""Channels of what can be looked at as it is: gray and RGB."""

_FULL_SCALE = {torch.uint8: 255, torch.uint16: 65535}


def full_scale(dtype: torch.dtype) -> int:
    """The highest level: 255 of uint8, 65535 of uint16."""
    return _FULL_SCALE[dtype]


def bits_of(dtype: torch.dtype) -> int:
    """8 of uint8, 16 of uint16."""
    return _FULL_SCALE[dtype].bit_length()


def dtype_of(bits: int) -> torch.dtype:
    """uint8 of 8 bits, uint16 of 16."""
    return {8: torch.uint8, 16: torch.uint16}[bits]


def is_picture(channels: int, dtype: torch.dtype) -> bool:
    """Whether images are gray or RGB of 8 bits: what JPEG holds and Pillow's color operations are for."""
    return channels in PICTURE_CHANNELS and dtype == torch.uint8


def rounded_(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float levels as whole ones of `dtype`, rounded to nearest and cut off at 0 and full scale; changes `x`."""
    return x.round_().clamp_(0, full_scale(dtype)).to(dtype)


def check_depth(found: torch.dtype, dtype: torch.dtype) -> None:
    """Raise DataError for images of another depth than those whose statistics normalize them."""
    if found != dtype:
        raise DataError(
            f"images of {bits_of(found)} bits per channel, but the model is for {bits_of(dtype)}: convert them"
        )


def movable(images: Tensor) -> Tensor:
    """The images to select, pad or turn, then to `view` as their own dtype: uint16 as int16, of the same bits.

    PyTorch has few operations for uint16, on some devices fewer than on others; conversions to float are among them.
    """
    return images.view(torch.int16) if images.dtype == torch.uint16 else images


def random_levels(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Uniformly random levels, on the CPU."""
    return torch.randint(0, full_scale(dtype) + 1, shape, dtype=torch.int32, generator=generator).to(dtype)
