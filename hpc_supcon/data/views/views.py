"""Augmented views of a batch, on the device of its images, with parameters drawn per sample and view."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError, unknown_name
from ..loaders.prefetch import sent
from .blur import SIGMA, gaussian_blur, kernel_size
from .color import Jitter, grayscale
from .normalize import normalize_, normalize_levels_
from .ops import operate_
from .parameters import ViewParameters, check_probabilities, check_ranges, check_strengths
from .policies import AutoAugment, RandAugment
from .resample import draw_boxes, flipped, resample

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
CPU_CACHE = 1 << 22
"""Bytes of float views worked on at once on a CPU: what comes next finds them in its cache."""


class Views(nn.Module):
    """uint8 [B, C, H, W] -> float [B, V, C, S, S], normalized; uint8 [B, V, C, S, S] when they come cropped.

    Policies, each distributed and computed as torchvision's transforms do for single images:

    - none: resized to S alone, so that all V views are equal
    - flip_crop: random resized crop, flip
    - simaugment: flip_crop, color jitter, gray, gaussian blur (SimCLR's)
    - autoaugment, randaugment: flip_crop, then their operations on whole gray levels

    Everything random is drawn from generators of its own, which can be saved (`state`): one on the CPU, and
    on CUDA a second one there, for boxes and factors. Small images on CUDA take one kernel (views_triton.py),
    others torch; nothing waits for the device.
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
        grayscale: float = 0.2,
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
        jitter_probability, grayscale, blur: probabilities. One-channel images have no saturation, hue or gray.
        seed: ints >= 0; (run seed, rank) gives every rank its own stream. channels_last: memory layout of the
        views' last three dimensions; dtype: float32 or bfloat16. Raises ConfigError outside these ranges.
        """
        super().__init__()
        check_ranges(count, image_size, crop_scale, crop_ratio)
        check_probabilities(flip=flip, jitter_probability=jitter_probability, grayscale=grayscale, blur=blur)
        check_strengths(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
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
        color = light and self.channels == 3
        strengths = (brightness * light, contrast * light, saturation * color, hue * color)
        self.jitter = Jitter(strengths, jitter_probability)
        self.orders = self.jitter.orders
        self.flip, self.grayscale, self.blur = flip * self.crops, grayscale * color, blur * light
        self.colors = bool(self.orders or self.operations or self.grayscale or self.blur)
        if self.blur and image_size < 2:
            raise ConfigError(f"augment.blur needs images of at least 2 pixels a side, not {image_size}")
        self.generator = self._device_generator = torch.Generator()
        self._seed_generators(seed)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] or [B, V, C, S, S] -> float [B, V, C, S, S], same device; advances the generator."""
        return self.render(images, self.draw(len(images), images.shape[-2], images.shape[-1]))

    def draw(self, batch: int, height: int, width: int) -> ViewParameters:
        """Parameters for `count` views of `batch` images of this size, in pixels."""
        n, generator, numbers, device = batch * self.count, self.generator, self._numbers(), self.mean.device
        if self.crops:
            boxes = draw_boxes(
                n, height, width, scale=self.crop_scale, ratio=self.crop_ratio, generator=numbers, device=device
            )
        else:
            boxes = sent(torch.tensor([0, 0, height, width]), device).expand(n, 4)
        chance = torch.rand(3, n, generator=generator)
        factors, order = self.jitter.draw(chance[1], generator, numbers)
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
            grayscale=chance[2] < self.grayscale,
            sigma=sigma,
            operations=operations,
            magnitudes=magnitudes,
        )

    def _numbers(self) -> torch.Generator:
        """The generator of boxes and factors, on the device: the views' one generator where that is the CPU."""
        device = self.mean.device
        if device.type == "cuda" and self._device_generator.device != device:
            self._device_generator = torch.Generator(device).manual_seed(self._device_seed)
        return self._device_generator

    def select(self, parameters: ViewParameters, images: slice) -> ViewParameters:
        """What was drawn for these images of the batch: `render` takes it with the images of the slice."""
        return parameters.select(slice(images.start * self.count, images.stop * self.count))

    @torch.no_grad()
    def render(self, images: Tensor, parameters: ViewParameters) -> Tensor:
        """The views that `parameters` describe: [B, V, C, S, S] of `dtype`; nothing is drawn."""
        B, C, V, S = len(images), images.shape[-3], self.count, self.image_size
        assert images.ndim == 4 or images.shape[1:] == (V, C, S, S), f"cropped images of shape {tuple(images.shape)}"
        assert self.channels == C, f"mean and std are for {self.channels} channels, the images have {C}"
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        views = torch.empty((B * V, C, S, S), dtype=self.dtype, device=images.device, memory_format=layout)
        # Without autocast: bf16 weights would move pixels by more than a gray level
        with torch.autocast(images.device.type, enabled=False):
            if self._fuses(images):
                from .triton import render

                render(images, parameters, self.jitter.sequences, self.mean, self.std, views)
            else:
                make = self._convert if images.ndim == 5 and not self.colors else self._render
                for rows in self._pieces(parameters, images.device):
                    make(images, parameters, rows, views)
        return views.unflatten(0, (B, V))

    def _pieces(self, parameters: ViewParameters, device: torch.device) -> list[Tensor]:
        """Views rendered at a time, int64 [k] each: of one group of the jitter, on a CPU as many as fit its cache."""
        n = len(parameters.boxes)
        groups = self.jitter.groups(parameters.order) if self.orders else [torch.arange(n)]
        size = CPU_CACHE // (4 * self.channels * self.image_size**2) if device.type == "cpu" else n
        return [piece for group in groups for piece in group.split(max(1, size)) if len(piece)]

    def _fuses(self, images: Tensor) -> bool:
        simple = self.crops and self.operations is None and not self.blur and images.ndim == 4
        small = max(*images.shape[-2:], self.image_size) <= FUSED_SIDE
        return images.is_cuda and simple and small and find_spec("triton") is not None

    def _render(self, images: Tensor, parameters: ViewParameters, rows: Tensor, views: Tensor) -> None:
        """The views of these rows (int64 [n], on the CPU) of `parameters`, into those of `views` [B * V, C, S, S]."""
        there = sent(rows, images.device)
        x = self._crop(images, parameters, rows)
        if self.operations is not None:
            x = self._operate(x, parameters.operations[rows], parameters.magnitudes[rows])
        if self.orders:
            self.jitter(x, parameters.factors.index_select(0, there), parameters.order[rows])
        self._make_grayscale(x, parameters.grayscale[rows])
        self._blur(x, parameters.sigma[rows])
        # in the layout of `views`, so that whole rows of memory are copied
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        done = normalize_(x, self.mean, self.std).transpose(0, 1)
        if self.orders:
            self._flat(views).index_copy_(0, there, self._flat(done.to(views.dtype, memory_format=layout)))
        else:
            views[_span(rows)].copy_(done)

    def _flat(self, views: Tensor) -> Tensor:
        return (views.permute(0, 2, 3, 1) if self.channels_last else views).flatten(1)

    def _crop(self, images: Tensor, parameters: ViewParameters, rows: Tensor) -> Tensor:
        """Cropped, resized and flipped: float32 [C, n, S, S] in 0..1."""
        flip = parameters.flip[rows]
        if images.ndim == 5:
            cropped = flipped(images.flatten(0, 1), rows, flip).transpose(0, 1)
            return cropped.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
        there = sent(rows, images.device)
        own, boxes = images.index_select(0, there // self.count), parameters.boxes.index_select(0, there)
        return resample(own, boxes.unsqueeze(1), sent(flip, there.device).unsqueeze(1), self.image_size).squeeze(2)

    def _convert(self, images: Tensor, parameters: ViewParameters, rows: Tensor, views: Tensor) -> None:
        """As _render, where cropped images [B, V, C, S, S] are flipped and normalized and no more."""
        pixels = flipped(images.flatten(0, 1), rows, parameters.flip[rows])
        target = views[_span(rows)]
        x = target if target.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
        normalize_levels_(x.copy_(pixels), self.mean, self.std)
        if x is not target:
            target.copy_(x)

    def _operate(self, x: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
        """x [C, n, S, S] after its AutoAugment or RandAugment operations, which work on whole gray levels."""
        levels = x.mul(255).round_().clamp_(0, 255).transpose(0, 1)
        pixels = levels.to(torch.uint8, memory_format=torch.contiguous_format)
        for step in range(operations.shape[1]):
            operate_(pixels, operations[:, step], magnitudes[:, step])
        return x.copy_(pixels.transpose(0, 1)).mul_(1 / 255)

    def _make_grayscale(self, x: Tensor, chosen: Tensor) -> None:
        """x [C, n, S, S] with the chosen views (bool [n], on the CPU) gray; in place."""
        if self.grayscale > 0:
            rows = sent(torch.where(chosen)[0], x.device)
            x.index_copy_(1, rows, grayscale(x.index_select(1, rows)).expand(x.shape[0], -1, -1, -1))

    def _blur(self, x: Tensor, sigma: Tensor) -> None:
        """x [C, n, S, S] with the views of sigma > 0 ([n], on the CPU) blurred; in place."""
        rows = torch.where(sigma > 0)[0]
        if len(rows):
            there, width = sent(rows, x.device), sent(sigma[rows], x.device)
            size = kernel_size(self.image_size)
            x.index_copy_(1, there, gaussian_blur(x.index_select(1, there), width, size))

    def denormalize(self, views: Tensor) -> Tensor:
        """Normalized views [..., C, S, S] as images in 0..1 again."""
        return views * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)

    def _seed_generators(self, seed: int | Sequence[int]) -> None:
        """One stream for what is decided on the CPU, another for the numbers drawn on the device."""
        seeds = np.random.SeedSequence(seed).generate_state(2, np.uint64) >> np.uint64(1)
        self.generator.manual_seed(int(seeds[0]))
        self._device_seed, self._device_generator = int(seeds[1]), self.generator

    def state(self) -> Tensor:
        """The generators' states, uint8 [k] on the CPU: what a resumed run needs to go on with the same views."""
        own = {id(generator): generator.get_state() for generator in (self.generator, self._numbers())}
        return torch.cat([*own.values()])

    def load_state(self, state: Tensor) -> None:
        """Go on from a state that `state` returned; on another kind of device with its part for the CPU alone."""
        cpu, rest = state.cpu().split([len(self.generator.get_state()), len(state) - len(self.generator.get_state())])
        self.generator.set_state(cpu.clone())
        numbers = self._numbers()
        if numbers is not self.generator and len(rest):
            numbers.set_state(rest.clone())


def _span(rows: Tensor) -> slice:
    """Of consecutive rows."""
    return slice(int(rows[0]), int(rows[-1]) + 1)
