"""Augmented views of a batch, on the device of its images, with parameters drawn per sample and view."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError, unknown_name
from ...parts import find
from ..crop_boxes import check_crops, draw_boxes, draw_padded_boxes
from .color import SIGMA, Jitter, check_probabilities, check_strengths, gaussian_blur, grayscale, kernel_size
from .levels import span, to_levels, to_planes
from .ops import operate_
from .own_policy import OwnPolicy
from .parameters import ViewParameters
from .pixels import copy_async, cut_windows, flip_selected, normalize_, normalize_levels_, resample
from .policies import AutoAugment, RandAugment

POLICIES: dict[str, Callable[..., AutoAugment | RandAugment | None]] = {
    "none": lambda **_: None,
    "flip_crop": lambda **_: None,
    "pad_crop": lambda **_: None,
    "simaugment": lambda **_: None,
    "autoaugment": lambda *, autoaugment, **_: AutoAugment(autoaugment),
    "randaugment": lambda *, randaugment, **_: RandAugment(**randaugment),
}
"""`augment.policy` -> the operations it adds to crop and flip, if any."""

FUSED_SIDE = 64
"""Largest side in pixels of the images and views that one kernel computes on CUDA."""
CPU_CACHE = 1 << 22
"""Bytes of float views processed at once on a CPU, so that they stay in its cache between operations."""


class Views(nn.Module):
    """uint8 [B, C, H, W] -> float [B, V, C, S, S], normalized; from uint8 [B, V, C, S, S] where they are cropped.

    Policies, each distributed and computed as torchvision's transforms do for single images:

    - none: resized to S alone, so that all V views are equal
    - flip_crop: random resized crop, flip
    - pad_crop: random crop of the padded image, flip
    - simaugment: crop, flip, color jitter, gray, gaussian blur (SimCLR's)
    - autoaugment, randaugment: crop, flip, then their operations on whole gray levels

    Everything random is drawn from the module's own generators, which `reseed` starts anew: one on the CPU and,
    for boxes and factors on CUDA, a second one there. Small images on CUDA take one kernel (triton.py), all others
    take torch operations; the host never waits for the device.
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
        blur: float = 0.0,
        autoaugment: str = "cifar10",
        randaugment: Mapping[str, int] | None = None,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """count: V, views per image. image_size: S in pixels. mean, std: [C] in units of 0..1.

        crop: a resized crop, or a square of S pixels out of the image with `padding` more pixels on each side, black
        or reflected (padding_mode); auto: padded for pad_crop, else resized. crop_scale: range of the resized crop's
        share of the area, within (0, 1]; crop_ratio: range of its width / height; flip: probability. All these
        apply to every policy but none; autoaugment (cifar10, imagenet or svhn) and
        randaugment (`operations`, `magnitude`) to the policy of that name; all others to simaugment. brightness,
        contrast, saturation: factors are drawn from max(0, 1 - x)..1 + x; hue in turns, from -x..x, x <= 0.5;
        jitter_probability, grayscale, blur: probabilities. One-channel images get no saturation, hue or grayscale.
        options: arguments of a policy of a user's own (see OwnPolicy).
        seed: see `reseed`. channels_last: memory layout of the
        views' last three dimensions; dtype: float32 or bfloat16. Raises ConfigError outside these ranges.
        """
        super().__init__()
        check_crops(count, image_size, crop_scale, crop_ratio)
        check_probabilities(flip=flip, jitter_probability=jitter_probability, grayscale=grayscale, blur=blur)
        check_strengths(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
        own = find("policies", policy, POLICIES)
        self.own = None if own is None else OwnPolicy(own, options, len(mean), image_size)
        if own is None and policy not in POLICIES:
            raise ConfigError(unknown_name("augment.policy", policy, POLICIES))
        build = POLICIES["none" if own else policy]
        self.operations = build(autoaugment=autoaugment, randaugment=randaugment or {})
        self.count, self.image_size, self.dtype, self.channels_last = count, image_size, dtype, channels_last
        self.crops, self.crop_scale, self.crop_ratio = policy != "none", crop_scale, crop_ratio
        padded = self.crops and (crop == "padded" or (crop == "auto" and policy == "pad_crop"))
        self.padding = padding if padded else None
        self.outside = padding_mode if padded else None
        # Not persistent: they belong to the configuration of the run, not to the weights in a checkpoint.
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32), persistent=False)
        self.channels = len(self.mean)
        photometric = policy == "simaugment"
        color = photometric and self.channels == 3
        strengths = (brightness * photometric, contrast * photometric, saturation * color, hue * color)
        self.jitter = Jitter(strengths, jitter_probability)
        self.jitters = bool(self.jitter.permutations)
        self.flip, self.grayscale, self.blur = flip * self.crops, grayscale * color, blur * photometric
        self.changes_colors = bool(self.jitters or self.operations or self.grayscale or self.blur or self.own)
        if self.blur and image_size < 2:
            raise ConfigError(f"augment.blur needs images of at least 2 pixels a side, not {image_size}")
        self.generator = self._device_generator = torch.Generator()
        self.reseed(seed)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] or [B, V, C, S, S] -> float [B, V, C, S, S], same device; advances the generators."""
        return self.render(images, self.draw(len(images), images.shape[-2], images.shape[-1]))

    def draw(self, batch: int, height: int, width: int) -> ViewParameters:
        """Random parameters of `count` views of each of `batch` images of this size in pixels."""
        n, generator, device = batch * self.count, self.generator, self.mean.device
        numbers = self._numbers_generator()
        if self.padding is not None:
            size, padding = self.image_size, self.padding
            if self.outside == "reflect" and padding >= min(height, width):
                raise ConfigError(
                    f"augment.padding={padding} mirrors more than images of {height}x{width} pixels have"
                )
            boxes = draw_padded_boxes(n, height, width, size, padding, generator=numbers, device=device)
        elif self.crops:
            boxes = draw_boxes(
                n, height, width, scale=self.crop_scale, ratio=self.crop_ratio, generator=numbers, device=device
            )
        else:
            boxes = copy_async(torch.tensor([0, 0, height, width]), device).expand(n, 4)
        chance = torch.rand(3, n, generator=generator)
        factors, permutation = self.jitter.draw(chance[1], generator, numbers)
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
            permutation=permutation,
            grayscale=chance[2] < self.grayscale,
            sigma=sigma,
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
        assert self.channels == C, f"mean and std are for {self.channels} channels, the images have {C}"
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        views = torch.empty((B * V, C, S, S), dtype=self.dtype, device=images.device, memory_format=layout)
        # Without autocast: bf16 weights would change pixels by more than a gray level
        with torch.autocast(images.device.type, enabled=False):
            if self._takes_kernel(images):
                from .triton import render

                sequences = self.jitter.sequences
                render(images, parameters, sequences, self.mean, self.std, views, outside=self.outside)
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
        simple = self.crops and self.operations is None and not self.own and not self.blur and images.ndim == 4
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
        self._make_grayscale(x, parameters.grayscale[rows])
        self._blur(x, parameters.sigma[rows])
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
            return to_planes(flip_selected(images.flatten(0, 1), rows, flip))
        device_rows = copy_async(rows, images.device)
        per_view = images.index_select(0, device_rows // self.count)
        boxes = parameters.boxes.index_select(0, device_rows)
        if self.padding is not None and self.outside is not None:
            windows = cut_windows(per_view, boxes, self.image_size, self.padding, self.outside)
            return to_planes(flip_selected(windows, torch.arange(len(rows)), flip))
        flip = copy_async(flip, images.device)
        return resample(per_view, boxes.unsqueeze(1), flip.unsqueeze(1), self.image_size).squeeze(2)

    def _write_flipped(self, images: Tensor, parameters: ViewParameters, rows: Tensor, views: Tensor) -> None:
        """As `_write`, where images [B, V, C, S, S] are cropped already and only need flip and normalization."""
        pixels = flip_selected(images.flatten(0, 1), rows, parameters.flip[rows])
        target = views[span(rows)]
        x = target if target.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
        normalize_levels_(x.copy_(pixels), self.mean, self.std)
        if x is not target:
            target.copy_(x)

    def _operate(self, x: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
        """AutoAugment or RandAugment operations on x [C, n, S, S], rounded to whole gray levels; in place."""
        pixels = to_levels(x)
        for step in range(operations.shape[1]):
            operate_(pixels, operations[:, step], magnitudes[:, step])
        return x.copy_(pixels.transpose(0, 1)).mul_(1 / 255)

    def _make_grayscale(self, x: Tensor, chosen: Tensor) -> None:
        """Convert the chosen views (bool [n], on the CPU) of x [C, n, S, S] to gray, in place."""
        if self.grayscale > 0:
            rows = copy_async(torch.where(chosen)[0], x.device)
            x.index_copy_(1, rows, grayscale(x.index_select(1, rows)).expand(x.shape[0], -1, -1, -1))

    def _blur(self, x: Tensor, sigma: Tensor) -> None:
        """Blur the views of x [C, n, S, S] whose sigma ([n], on the CPU) is above 0, in place."""
        rows = torch.where(sigma > 0)[0]
        if len(rows):
            device_rows, device_sigma = copy_async(rows, x.device), copy_async(sigma[rows], x.device)
            blurred = gaussian_blur(x.index_select(1, device_rows), device_sigma, kernel_size(self.image_size))
            x.index_copy_(1, device_rows, blurred)

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
