"""Augmented views of a batch, on the device of its images, with parameters drawn per sample and view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .colour import HUE, adjust_hue, blend, grey
from .resample import draw_boxes, resample

CPU_GROUP = 64
"""Views whose colour is worked on at once on a CPU: 32x32 RGB ones stay in a core's cache."""


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


class Views(nn.Module):
    """uint8 [B, C, H, W] -> float32 [B, V, C, S, S], normalised.

    Random resized crop, flip, colour jitter, grey and normalisation, each distributed and computed as
    torchvision's transforms do for single float images. Everything random is drawn on the CPU from a
    generator of its own, so that the stream is the same on every device and can be saved (`state`).
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
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.1,
        jitter_probability: float = 0.8,
        grey: float = 0.2,
        seed: int | Sequence[int] = 0,
        channels_last: bool = False,
    ) -> None:
        """count: V, views per image. image_size: S in pixels. mean, std: [C] in units of 0..1.

        crop_scale: range of the share of the area, within (0, 1]; crop_ratio: range of width / height.
        flip, jitter_probability, grey: probabilities. brightness, contrast, saturation: factors are drawn
        from max(0, 1 - x)..1 + x; hue in turns, from -x..x, x <= 0.5. seed: ints >= 0; (run seed, rank) gives
        every rank its own stream. channels_last: memory layout of the views' last three dimensions.
        Raises ConfigError for values outside these ranges. One-channel images have no saturation, hue or grey.
        """
        super().__init__()
        _check_ranges(count, image_size, crop_scale, crop_ratio)
        _check_probabilities(flip=flip, jitter_probability=jitter_probability, grey=grey)
        _check_strengths(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
        self.count, self.image_size = count, image_size
        self.crop_scale, self.crop_ratio, self.flip = crop_scale, crop_ratio, flip
        self.channels_last = channels_last
        # Not persistent: they are the run's configuration, not weights of a checkpoint.
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32), persistent=False)
        self.channels = len(self.mean)
        colour = self.channels == 3
        strengths = (brightness, contrast, saturation * colour, hue * colour)
        self.grey = grey * colour
        low = [max(0.0, 1 - s) for s in strengths[:3]] + [-strengths[3]]
        high = [1 + s for s in strengths[:3]] + [strengths[3]]
        self._factor_range = torch.tensor([low, high])
        active = [k for k, strength in enumerate(strengths) if strength > 0]
        self.orders = tuple(permutations(active)) if active else ()
        self.turns_hue = HUE in active
        # Per order: how many blends come before the hue, and which blends, one after the other.
        self._hue_place = torch.tensor([order.index(HUE) if self.turns_hue else 0 for order in self.orders])
        blends = [[k for k in order if k != HUE] for order in self.orders]
        self._blends = torch.tensor(blends, dtype=torch.int64)
        self.jitter_probability = jitter_probability if active else 0.0
        self.generator = torch.Generator()
        state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        self.generator.manual_seed(int(state[0] >> np.uint64(1)))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32 [B, V, C, S, S] on the same device; advances the generator."""
        return self.render(images, self.draw(len(images), images.shape[2], images.shape[3]))

    def draw(self, batch: int, height: int, width: int) -> ViewParameters:
        """Parameters for `count` views of `batch` images of this size, in pixels."""
        n, generator = batch * self.count, self.generator
        boxes = draw_boxes(n, height, width, scale=self.crop_scale, ratio=self.crop_ratio, generator=generator)
        chance = torch.rand(3, n, generator=generator)
        low, high = self._factor_range
        return ViewParameters(
            boxes=boxes,
            flip=chance[0] < self.flip,
            factors=torch.rand(n, 4, generator=generator) * (high - low) + low,
            order=torch.where(
                chance[1] < self.jitter_probability,
                torch.randint(max(len(self.orders), 1), (n,), generator=generator),
                -1,
            ),
            grey=chance[2] < self.grey,
        )

    def select(self, parameters: ViewParameters, images: slice) -> ViewParameters:
        """What was drawn for these images of the batch: `render` takes it with the images of the slice."""
        rows = slice(images.start * self.count, images.stop * self.count)
        return ViewParameters(**{name: value[rows] for name, value in vars(parameters).items()})

    @torch.no_grad()
    def render(self, images: Tensor, parameters: ViewParameters) -> Tensor:
        """The views that `parameters` describe: float32 [B, V, C, S, S]; nothing is drawn."""
        B, C = images.shape[:2]
        assert self.channels == C, f"mean and std are for {self.channels} channels, the images have {C}"
        device, V, S = images.device, self.count, self.image_size
        # Without autocast: bf16 weights would move pixels by more than a grey level
        with torch.autocast(device.type, enabled=False):
            x = resample(
                images, parameters.boxes.view(B, V, 4).to(device), parameters.flip.view(B, V).to(device), S
            ).flatten(1, 2)
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            views = torch.empty((B * V, C, S, S), device=device, memory_format=layout)
            if self.orders:
                x, rows = self._jitter(x, parameters)
                normalise_(self._make_grey(x, parameters.grey[rows]), self.mean, self.std)
                views.index_copy_(0, rows.to(device), x.transpose(0, 1))
            else:
                normalise_(self._make_grey(x, parameters.grey), self.mean, self.std)
                views.copy_(x.transpose(0, 1))
        return views.unflatten(0, (B, V))

    def _jitter(self, x: Tensor, parameters: ViewParameters) -> tuple[Tensor, Tensor]:
        """x [C, n, S, S] with its colour operations applied, in another sequence of views, and that sequence.

        Views whose hue is turned at the same place in their order are put side by side, so that an operation
        runs on all of them at once: what comes before and after the hue are blends, whatever their order.
        """
        turn = torch.where(parameters.order < 0, -1, self._hue_place[parameters.order])
        rows = torch.argsort(turn, stable=True)
        blends = self._blends[parameters.order[rows]]
        factors = parameters.factors[rows]
        hue = factors[:, HUE].to(x.device)
        strength = factors.gather(1, blends).to(x.device)
        blends = blends.to(x.device)
        x = x.index_select(1, rows.to(x.device))

        size = CPU_GROUP if x.device.type == "cpu" else len(rows)
        ends = torch.bincount(turn + 1, minlength=blends.shape[1] + 2).cumsum(0).tolist()
        for place, (start, end) in enumerate(pairwise(ends)):  # views of place -1 lie before ends[0]: no jitter
            for first in range(start, end, size):
                part = slice(first, min(first + size, end))
                self._operate(x[:, part], place, hue[part], blends[part], strength[part])
        return x, rows

    def _operate(self, x: Tensor, place: int, hue: Tensor, blends: Tensor, strength: Tensor) -> None:
        """Turn the hue after `place` of the blends [n, steps], all in place on x [C, n, S, S]."""
        for step in range(blends.shape[1] + 1):
            if self.turns_hue and step == place:
                adjust_hue(x, hue)
            if step < blends.shape[1]:
                blend(x, blends[:, step], strength[:, step])

    def _make_grey(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x [C, n, S, S] with the chosen views (bool [n], on the CPU) grey; in place."""
        if self.grey > 0:
            rows = torch.where(chosen)[0].to(x.device)
            x.index_copy_(1, rows, grey(x.index_select(1, rows)).expand(x.shape[0], -1, -1, -1))
        return x

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


def normalise_(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std in place; x float [C, ...], mean and std [C]."""
    shape = (-1, *[1] * (x.ndim - 1))
    return x.sub_(mean.view(shape)).mul_(std.reciprocal().view(shape))


class EvalTransform(nn.Module):
    """uint8 [B, C, H, W] -> float32 [B, C, H, W], normalised: what evaluation sees."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> None:
        """mean, std: [C] in units of 0..1."""
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        scaled = images.float().mul_(1 / 255).transpose(0, 1)
        return normalise_(scaled, self.mean, self.std).transpose(0, 1)
