"""Augmented views of a batch, on the device of its images, with parameters drawn per sample and view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError, unknown_name
from ...parts import find
from ..crop_boxes import check_crops
from ..levels import PICTURE_CHANNELS, check_depth, dtype_of, full_scale, is_picture, movable
from .color import (
    Jitter,
    PerView,
    change_,
    check_probabilities,
    check_strengths,
    draw_sigma,
    gaussian_blur,
    grayscale,
    kernel_size,
    per_view,
    solarize,
)
from .crops import Crops
from .ops import operate_
from .own_policy import OwnPolicy
from .parameters import ViewParameters
from .pixels import copy_async, flip_selected, normalize_, normalize_levels_, planes_of, span, to_levels
from .policies import POLICIES, check_policy, left_out

FUSED_SIDE = 64
"""Largest side in pixels of the images and views that one kernel computes on CUDA."""
CPU_CACHE = 1 << 22
"""Bytes of float views processed at once on a CPU, so that they stay in its cache between operations."""


class Views(nn.Module):
    """uint8 or uint16 [B, C, H, W] -> float [B, V, C, S, S], normalized; from [B, V, C, S, S] where they are cropped.

    Policies, each distributed and computed as torchvision's transforms do for single images:

    - none: resized to S alone, so that all V views are equal
    - flip_crop: random resized crop, flip
    - pad_crop: random crop of the padded image, flip
    - simaugment: crop, flip, color jitter, gray, gaussian blur (SimCLR's), solarization (BYOL's)
    - autoaugment, randaugment: crop, flip, then their operations on whole gray levels, of 8-bit gray and RGB alone

    Images of other than 1 or 3 channels get no color jitter (see policies.left_out).

    Everything random is drawn from the module's own generators, which `reseed` starts anew: one on the CPU and,
    for boxes and factors on CUDA, a second one there. Small images on CUDA take one kernel (triton.py), all others
    take torch operations; the host never waits for the device.

    Arguments. count: V, views per image. image_size: S in pixels. mean, std: [C] in units of 0..1. crop: a resized
    crop, or a square of S pixels out of the image with `padding` more pixels on each side, black or reflected
    (padding_mode); auto: padded for pad_crop, else resized. crop_scale: range of the resized crop's share of the
    area, within (0, 1]; crop_ratio: range of its width / height; flip: probability. All these apply to every policy
    but none; autoaugment (cifar10, imagenet or svhn) and randaugment (`operations`, `magnitude`) to the policy of
    that name; all others to simaugment. brightness, contrast, saturation: factors drawn from max(0, 1 - x)..1 + x;
    hue in turns, from -x..x, x <= 0.5; jitter_probability, grayscale, blur, solarize: probabilities, the last two for
    all views or one for each. One-channel images get no saturation, hue or grayscale. options: arguments of a policy
    of a user's own (see OwnPolicy). seed: see `reseed`.
    channels_last: memory layout of the views' last three dimensions; dtype: float32 or bfloat16. Raises ConfigError
    outside these ranges.
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
        bits: int = 8,
        policy: str = "simaugment",
        crop: Literal["auto", "resized", "padded"] = "auto",
        padding: int = 4,
        padding_mode: Literal["zeros", "reflect"] = "zeros",
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.1,
        jitter_probability: float = 0.8,
        grayscale: float = 0.2,
        blur: PerView = 0.0,
        solarize: PerView = 0.0,
        autoaugment: str = "cifar10",
        randaugment: Mapping[str, int] | None = None,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_crops(count, image_size, crop_scale, crop_ratio)
        check_probabilities(flip=flip, jitter_probability=jitter_probability, grayscale=grayscale)
        check_strengths(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
        self.own = self._own_policy(policy, options, len(mean), image_size)
        build = POLICIES["none" if self.own else policy]
        self.operations = build(autoaugment=autoaugment, randaugment=randaugment or {})
        self.count, self.image_size, self.dtype, self.channels_last = count, image_size, dtype, channels_last
        self.crops = Crops(image_size, policy, crop, padding, padding_mode, crop_scale, crop_ratio)
        # Not persistent: they belong to the configuration of the run, not to the weights in a checkpoint.
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32), persistent=False)
        self.channels, self.pixels = len(self.mean), dtype_of(bits)
        check_policy(policy, self.channels, bits)
        photometric = policy == "simaugment" and self.channels in PICTURE_CHANNELS
        color = photometric and self.channels == 3
        strengths = (brightness * photometric, contrast * photometric, saturation * color, hue * color)
        self.jitter = Jitter(strengths, jitter_probability)
        self.jitters = bool(self.jitter.permutations)
        self.flip, self.grayscale = flip * self.crops.random, grayscale * color
        self.blur = per_view("blur", blur, count) * (policy == "simaugment")
        self.solarize = per_view("solarize", solarize, count) * photometric
        self.blurs, self.solarizes = bool(self.blur.any()), bool(self.solarize.any())
        self.left_out = left_out(policy, self.channels)
        """A line for the user about what these images do not get of the policy; empty where they get all of it."""
        changes = (self.jitters, self.operations, self.grayscale, self.blurs, self.solarizes, self.own)
        self.changes_colors = any(map(bool, changes))
        if self.blurs and image_size < 2:
            raise ConfigError(f"augment.blur needs images of at least 2 pixels a side, not {image_size}")
        self.generator = self._device_generator = torch.Generator()
        self.reseed(seed)

    @staticmethod
    def _own_policy(
        policy: str, options: Mapping[str, Any] | None, channels: int, image_size: int
    ) -> OwnPolicy | None:
        """None for a policy of this package. Raises ConfigError for one that does not exist."""
        own = find("policies", policy, POLICIES)
        if own is None and policy not in POLICIES:
            raise ConfigError(unknown_name("augment.policy", policy, POLICIES))
        return None if own is None else OwnPolicy(own, options, channels, image_size)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Levels [B, C, H, W] or [B, V, C, S, S] -> float [B, V, C, S, S], same device; advances the generators."""
        return self.render(images, self.draw(len(images), images.shape[-2], images.shape[-1]))

    def draw(self, batch: int, height: int, width: int) -> ViewParameters:
        """Random parameters of `count` views of each of `batch` images of this size in pixels."""
        n, generator, device = batch * self.count, self.generator, self.mean.device
        numbers = self._numbers_generator()
        boxes = self.crops.draw(n, height, width, numbers, device)
        chance = torch.rand(3, n, generator=generator)
        factors, permutation = self.jitter.draw(chance[1], generator, numbers)
        sigma = draw_sigma(self.blur.repeat(batch), generator) if self.blurs else torch.zeros(n)
        operations, magnitudes = torch.empty(n, 0, dtype=torch.int64), torch.empty(n, 0, dtype=torch.float64)
        if self.operations is not None:
            operations, magnitudes = self.operations.draw(n, self.image_size, self.image_size, generator)
        solarized = torch.zeros(n, dtype=torch.bool)
        if self.solarizes:
            solarized = torch.rand(n, generator=generator) < self.solarize.repeat(batch)
        return ViewParameters(
            boxes=boxes,
            flip=chance[0] < self.flip,
            factors=factors,
            permutation=permutation,
            grayscale=chance[2] < self.grayscale,
            sigma=sigma,
            solarize=solarized,
            operations=operations,
            magnitudes=magnitudes,
            seeds=torch.empty(n, 0) if self.own is None else self.own.draw(n, generator),
        )

    def _numbers_generator(self) -> torch.Generator:
        """The generator of boxes and factors, on the device of the views; on the CPU there is only one generator."""
        device = self.mean.device
        if device.type == "cuda" and self._device_generator.device != device:
            self._device_generator = torch.Generator(device).manual_seed(self._device_seed)
        return self._device_generator

    def select(self, parameters: ViewParameters, images: slice) -> ViewParameters:
        """The parameters of these images of the batch: `render` takes them with the images of the slice."""
        return parameters.select(slice(images.start * self.count, images.stop * self.count))

    @torch.no_grad()
    def render(self, images: Tensor, parameters: ViewParameters) -> Tensor:
        """The views with these parameters: [B, V, C, S, S] of `dtype`; draws no random numbers."""
        B, C, V, S = len(images), images.shape[-3], self.count, self.image_size
        assert images.ndim == 4 or images.shape[1:] == (V, C, S, S), f"cropped images of shape {tuple(images.shape)}"
        check_depth(images.dtype, self.pixels)
        assert self.channels == C, f"mean and std are for {self.channels} channels, the images have {C}"
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        views = torch.empty((B * V, C, S, S), dtype=self.dtype, device=images.device, memory_format=layout)
        # Without autocast: bf16 weights would change pixels by more than a gray level
        with torch.autocast(images.device.type, enabled=False):
            if self._takes_kernel(images):
                from .triton import render

                sequences = self.jitter.sequences
                render(images, parameters, sequences, self.mean, self.std, views, outside=self.crops.outside)
            else:
                write = self._write_flipped if images.ndim == 5 and not self.changes_colors else self._write
                for rows in self._chunks(parameters, images.device):
                    write(images, parameters, rows, views)
        return views.unflatten(0, (B, V))

    def _chunks(self, parameters: ViewParameters, device: torch.device) -> list[Tensor]:
        """Views rendered at a time, int64 [k]: of one group of the jitter, on a CPU as many as fit into its cache."""
        n = len(parameters.boxes)
        groups = self.jitter.groups(parameters.permutation) if self.jitters else [torch.arange(n)]
        size = CPU_CACHE // (4 * self.channels * self.image_size**2) if device.type == "cpu" and not self.own else n
        return [chunk for group in groups for chunk in group.split(max(1, size)) if len(chunk)]

    def _takes_kernel(self, images: Tensor) -> bool:
        simple = self.crops.random and not (self.operations or self.own or self.blurs) and images.ndim == 4
        simple = simple and is_picture(self.channels, self.pixels)  # other images take torch operations
        small = max(*images.shape[-2:], self.image_size) <= FUSED_SIDE
        return images.is_cuda and simple and small and find_spec("triton") is not None

    def _write(self, images: Tensor, parameters: ViewParameters, rows: Tensor, views: Tensor) -> None:
        """Render the views of these rows (int64 [n], on the CPU) into the same rows of `views` [B * V, C, S, S]."""
        device_rows = copy_async(rows, images.device)
        x = self._crop(images, parameters, rows)
        if self.operations is not None:
            x = self._operate(x, parameters.operations[rows], parameters.magnitudes[rows])
        if self.own is not None:
            x.copy_(self.own(to_levels(x), int(parameters.seeds[rows[0]])).transpose(0, 1)).mul_(1 / 255)
        if self.jitters:
            self.jitter(x, parameters.factors.index_select(0, device_rows), parameters.permutation[rows])
        if self.grayscale:
            change_(x, parameters.grayscale[rows], lambda chosen: grayscale(chosen).expand_as(chosen))
        if self.blurs:
            sigma = parameters.sigma[rows]
            drawn = copy_async(sigma[sigma > 0], x.device)
            change_(x, sigma > 0, lambda chosen: gaussian_blur(chosen, drawn, kernel_size(self.image_size)))
        if self.solarizes:
            change_(x, parameters.solarize[rows], solarize)
        # in the layout of `views`, so that whole rows of memory are copied
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        normalized = normalize_(x, self.mean, self.std).transpose(0, 1)
        if self.jitters:
            source = self._flat(normalized.to(views.dtype, memory_format=layout))
            self._flat(views).index_copy_(0, device_rows, source)
        else:
            views[span(rows)].copy_(normalized)

    def _flat(self, views: Tensor) -> Tensor:
        return (views.permute(0, 2, 3, 1) if self.channels_last else views).flatten(1)

    def _crop(self, images: Tensor, parameters: ViewParameters, rows: Tensor) -> Tensor:
        """Cropped, resized and flipped: float32 [C, n, S, S] in 0..1."""
        flip = parameters.flip[rows]
        if images.ndim == 5:
            return planes_of(flip_selected(images.flatten(0, 1), rows, flip))
        device_rows = copy_async(rows, images.device)
        per_view = movable(images).index_select(0, device_rows // self.count).view(images.dtype)
        return self.crops.cut(per_view, parameters.boxes.index_select(0, device_rows), flip)

    def _write_flipped(self, images: Tensor, parameters: ViewParameters, rows: Tensor, views: Tensor) -> None:
        """As `_write`, where images [B, V, C, S, S] are cropped already and only need flip and normalization."""
        pixels = flip_selected(images.flatten(0, 1), rows, parameters.flip[rows])
        target = views[span(rows)]
        x = target if target.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
        normalize_levels_(x.copy_(pixels), self.mean, self.std, full_scale(self.pixels))
        if x is not target:
            target.copy_(x)

    def _operate(self, x: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
        """AutoAugment or RandAugment operations on x [C, n, S, S], rounded to whole gray levels; in place."""
        pixels = to_levels(x)
        for step in range(operations.shape[1]):
            operate_(pixels, operations[:, step], magnitudes[:, step])
        return x.copy_(pixels.transpose(0, 1)).mul_(1 / 255)

    def denormalize(self, views: Tensor) -> Tensor:
        """Normalized views [..., C, S, S] -> pixels in 0..1."""
        return views * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)

    def reseed(self, seed: int) -> None:
        """Start both generators anew, seed >= 0: what is drawn from here on depends on `seed` alone."""
        # one stream for what is decided on the CPU, another for the numbers drawn on the device
        seeds = np.random.SeedSequence(seed).generate_state(2, np.uint64) >> np.uint64(1)
        self.generator.manual_seed(int(seeds[0]))
        self._device_seed = int(seeds[1])
        if self._device_generator is not self.generator:
            self._device_generator.manual_seed(self._device_seed)
