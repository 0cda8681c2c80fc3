"""Augmented views of a batch, on the device of its images, with parameters drawn per sample and view."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown_name
from .blur import SIGMA, gaussian_blur, kernel_size
from .colour import grey
from .jitter import Jitter
from .normalise import normalise_
from .ops import operate_
from .policies import AutoAugment, RandAugment
from .resample import draw_boxes, resample
from .transfer import send

POLICIES: dict[str, Callable[..., AutoAugment | RandAugment | None]] = {
    "none": lambda **_: None,
    "flip_crop": lambda **_: None,
    "simaugment": lambda **_: None,
    "autoaugment": lambda *, autoaugment, **_: AutoAugment(autoaugment),
    "randaugment": lambda *, randaugment, **_: RandAugment(**randaugment),
}
"""`augment.policy` -> the operations it adds to crop and flip, if any."""

FUSED_SIDE = 64
"""Images and views up to this side, in pixels, are made by one kernel on CUDA."""


CPU_CACHE, SMALL = 1 << 22, 64
"""Bytes of float views worked on at once on a CPU, for views of more than SMALL px."""


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for n = B * V views (the V views of an image side by side), on the CPU."""

    boxes: Tensor
    """int64 [n, 4]: top, left, height, width of the crop."""
    flip: Tensor
    """bool [n]: mirrored left to right."""
    factors: Tensor
    """float32 [n, 4]: brightness, contrast, saturation (factors >= 0) and hue (turns)."""
    order: Tensor
    """int64 [n]: which of Views.orders the colour operations are applied in; -1 for none of them."""
    grey: Tensor
    """bool [n]: made grey, after the colour operations."""
    sigma: Tensor
    """float32 [n]: standard deviation of the blur in pixels; 0 for none."""
    operations: Tensor
    """int64 [n, steps]: operations of AutoAugment or RandAugment (indices into ops.OPERATIONS), in sequence."""
    magnitudes: Tensor
    """float64 [n, steps]: their magnitudes (see ops.OPERATIONS)."""


class Views(nn.Module):
    """uint8 [B, C, H, W] -> float [B, V, C, S, S], normalised; uint8 [B, V, C, S, S] when they come cropped.

    Policies, each distributed and computed as torchvision's transforms do for single images:

    - none: resized to S alone, so that all V views are equal
    - flip_crop: random resized crop, flip
    - simaugment: flip_crop, colour jitter, grey, gaussian blur (SimCLR's)
    - autoaugment, randaugment: flip_crop, then their operations on whole grey levels

    Everything random is drawn on the CPU from a generator of its own, so that the stream is the same on every
    device and can be saved (`state`). Small images on CUDA take one kernel (views_triton.py), others torch.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        count: int,
        image_size: int,
        *,
        mean: Tensor | Sequence[float],
        std: Tensor | Sequence[float],
        policy: str = "simaugment",
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.1,
        jitter_probability: float = 0.8,
        grey: float = 0.2,
        blur: float = 0.0,
        autoaugment: str = "cifar10",
        randaugment: Mapping[str, int] | None = None,
        seed: int | Sequence[int] = 0,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """count: V, views per image. image_size: S in pixels. mean, std: [C] in units of 0..1.

        crop_scale: range of the share of the area, within (0, 1]; crop_ratio: range of width / height; flip:
        probability. These three serve every policy but none; autoaugment (cifar10, imagenet or svhn) and
        randaugment (`operations`, `magnitude`) the one of their name; what follows simaugment. brightness,
        contrast, saturation: factors are drawn from max(0, 1 - x)..1 + x; hue in turns, from -x..x, x <= 0.5;
        jitter_probability, grey, blur: probabilities. One-channel images have no saturation, hue or grey.
        seed: ints >= 0; (run seed, rank) gives every rank its own stream. channels_last: memory layout of the
        views' last three dimensions; dtype: float32 or bfloat16. Raises ConfigError outside these ranges.
        """
        super().__init__()
        _check_ranges(count, image_size, crop_scale, crop_ratio)
        _check_probabilities(flip=flip, jitter_probability=jitter_probability, grey=grey, blur=blur)
        _check_strengths(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
        if policy not in POLICIES:
            raise ConfigError(unknown_name("augment.policy", policy, POLICIES))
        self.operations = POLICIES[policy](autoaugment=autoaugment, randaugment=randaugment or {})
        self.count, self.image_size, self.dtype, self.channels_last = count, image_size, dtype, channels_last
        self.crops, self.crop_scale, self.crop_ratio = policy != "none", crop_scale, crop_ratio
        # Not persistent: they are the run's configuration, not weights of a checkpoint.
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32), persistent=False)
        self.channels = len(self.mean)
        light = policy == "simaugment"
        colour = light and self.channels == 3
        strengths = (brightness * light, contrast * light, saturation * colour, hue * colour)
        self.jitter = Jitter(strengths, jitter_probability)
        self.orders = self.jitter.orders
        self.flip, self.grey, self.blur = flip * self.crops, grey * colour, blur * light
        if self.blur and image_size < 2:
            raise ConfigError(f"augment.blur needs images of at least 2 pixels a side, not {image_size}")
        self.generator = torch.Generator()
        state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        self.generator.manual_seed(int(state[0] >> np.uint64(1)))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] or [B, V, C, S, S] -> float [B, V, C, S, S], same device; advances the generator."""
        return self.render(images, self.draw(len(images), images.shape[-2], images.shape[-1]))

    def draw(self, batch: int, height: int, width: int) -> ViewParameters:
        """Parameters for `count` views of `batch` images of this size, in pixels."""
        n, generator = batch * self.count, self.generator
        if self.crops:
            boxes = draw_boxes(n, height, width, scale=self.crop_scale, ratio=self.crop_ratio, generator=generator)
        else:
            boxes = torch.tensor([0, 0, height, width]).expand(n, 4)
        chance = torch.rand(3, n, generator=generator)
        factors, order = self.jitter.draw(chance[1], generator)
        sigma = torch.zeros(n)
        if self.blur:
            blurred = torch.rand(2, n, generator=generator)
            drawn = blurred[1] * (SIGMA[1] - SIGMA[0]) + SIGMA[0]
            sigma = torch.where(blurred[0] < self.blur, drawn, sigma)
        operations, magnitudes = torch.empty(n, 0, dtype=torch.int64), torch.empty(n, 0, dtype=torch.float64)
        if self.operations is not None:
            operations, magnitudes = self.operations.draw(n, self.image_size, self.image_size, generator)
        return ViewParameters(
            boxes=boxes,
            flip=chance[0] < self.flip,
            factors=factors,
            order=order,
            grey=chance[2] < self.grey,
            sigma=sigma,
            operations=operations,
            magnitudes=magnitudes,
        )

    def select(self, parameters: ViewParameters, images: slice) -> ViewParameters:
        """What was drawn for these images of the batch: `render` takes it with the images of the slice."""
        rows = slice(images.start * self.count, images.stop * self.count)
        return ViewParameters(**{name: value[rows] for name, value in vars(parameters).items()})

    @torch.no_grad()
    def render(self, images: Tensor, parameters: ViewParameters) -> Tensor:
        """The views that `parameters` describe: [B, V, C, S, S] of `dtype`; nothing is drawn."""
        B, C, V, S = len(images), images.shape[-3], self.count, self.image_size
        assert self.channels == C, f"mean and std are for {self.channels} channels, the images have {C}"
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        views = torch.empty((B * V, C, S, S), dtype=self.dtype, device=images.device, memory_format=layout)
        # Without autocast: bf16 weights would move pixels by more than a grey level
        with torch.autocast(images.device.type, enabled=False):
            if self._fuses(images):
                from .views_triton import render

                render(images, parameters, self.jitter.sequences, self.mean, self.std, views)
            else:
                for piece in self._pieces(images):
                    rows = slice(piece.start * V, piece.stop * V)
                    self._render(images[piece], self.select(parameters, piece), views[rows])
        return views.unflatten(0, (B, V))

    def _pieces(self, images: Tensor) -> list[slice]:
        """Images rendered at a time: all, or on a CPU as many large ones as its cache holds the views of."""
        B, S = len(images), self.image_size
        fitting = max(1, CPU_CACHE // (4 * self.count * self.channels * S * S))
        step = B if images.device.type != "cpu" or S <= SMALL else fitting
        return [slice(a, min(a + step, B)) for a in range(0, B, max(1, step))]

    def _fuses(self, images: Tensor) -> bool:
        simple = self.crops and self.operations is None and not self.blur and images.ndim == 4
        small = max(*images.shape[-2:], self.image_size) <= FUSED_SIDE
        return images.is_cuda and simple and small and find_spec("triton") is not None

    def _render(self, images: Tensor, parameters: ViewParameters, views: Tensor) -> None:
        """Into `views` [B * V, C, S, S]."""
        x = self._crop(images, parameters)
        if self.operations is not None:
            x = self._operate(x, parameters)
        rows: Any = slice(None)
        if self.orders:
            x, rows = self.jitter(x, parameters.factors, parameters.order)
        self._make_grey(x, parameters.grey[rows])
        self._blur(x, parameters.sigma[rows])
        done = normalise_(x, self.mean, self.std).transpose(0, 1)
        if self.orders:
            views.index_copy_(0, send(rows, views.device), done.to(views.dtype))
        else:
            views.copy_(done)

    def _crop(self, images: Tensor, parameters: ViewParameters) -> Tensor:
        """Cropped, resized and flipped: float32 [C, B * V, S, S] in 0..1."""
        B, V, S = len(images), self.count, self.image_size
        if images.ndim == 4:
            boxes, flip = parameters.boxes.view(B, V, 4), parameters.flip.view(B, V)
            return resample(images, send(boxes, images.device), send(flip, images.device), S).flatten(1, 2)
        assert images.shape[1] == V, f"cropped images come in {V} views each, not {images.shape[1]}"
        assert images.shape[3:] == (S, S), f"cropped images have {S} x {S} pixels, not {tuple(images.shape[3:])}"
        flip = send(parameters.flip, images.device).view(-1, 1, 1, 1)
        cropped = torch.where(flip, images.flip(-1).flatten(0, 1), images.flatten(0, 1)).transpose(0, 1)
        return cropped.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)

    def _operate(self, x: Tensor, parameters: ViewParameters) -> Tensor:
        """x [C, n, S, S] after its AutoAugment or RandAugment operations, which work on whole grey levels."""
        levels = x.mul(255).round_().clamp_(0, 255).transpose(0, 1)
        pixels = levels.to(torch.uint8, memory_format=torch.contiguous_format)
        for step in range(parameters.operations.shape[1]):
            operate_(pixels, parameters.operations[:, step], parameters.magnitudes[:, step])
        return x.copy_(pixels.transpose(0, 1)).mul_(1 / 255)

    def _make_grey(self, x: Tensor, chosen: Tensor) -> None:
        """x [C, n, S, S] with the chosen views (bool [n], on the CPU) grey; in place."""
        if self.grey > 0:
            rows = send(torch.where(chosen)[0], x.device)
            x.index_copy_(1, rows, grey(x.index_select(1, rows)).expand(x.shape[0], -1, -1, -1))

    def _blur(self, x: Tensor, sigma: Tensor) -> None:
        """x [C, n, S, S] with the views of sigma > 0 ([n], on the CPU) blurred; in place."""
        rows = torch.where(sigma > 0)[0]
        if len(rows):
            there, width = send(rows, x.device), send(sigma[rows], x.device)
            size = kernel_size(self.image_size)
            x.index_copy_(1, there, gaussian_blur(x.index_select(1, there), width, size))

    def denormalise(self, views: Tensor) -> Tensor:
        """Normalised views [..., C, S, S] as images in 0..1 again."""
        return views * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)

    def state(self) -> Tensor:
        """The generator's state, uint8 [k] on the CPU: what a resumed run needs to go on with the same views."""
        return self.generator.get_state()

    def load_state(self, state: Tensor) -> None:
        """Go on from a state that `state` returned."""
        self.generator.set_state(state.cpu())


def _check_ranges(
    count: int, image_size: int, crop_scale: tuple[float, float], crop_ratio: tuple[float, float]
) -> None:
    if count < 1 or image_size < 1:
        raise ConfigError(f"views need count >= 1 and image_size >= 1, not {count} and {image_size}")
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ConfigError(f"crop_scale must be an increasing pair within (0, 1], not {crop_scale}")
    if not 0 < crop_ratio[0] <= crop_ratio[1]:
        raise ConfigError(f"crop_ratio must be an increasing pair of positive numbers, not {crop_ratio}")


def _check_probabilities(**probabilities: float) -> None:
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is a probability, not {value}")


def _check_strengths(**strengths: float) -> None:
    for name, value in strengths.items():
        if not 0 <= value <= (0.5 if name == "hue" else float("inf")):
            raise ConfigError(f"{name} must be at least 0{' and at most 0.5' * (name == 'hue')}, not {value}")
