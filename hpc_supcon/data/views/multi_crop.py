"""Multi-crop: global views, and smaller local ones, of the same images (Caron et al. 2020, SwAV, section 3.2)."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from torch import Tensor, nn

from ...errors import ConfigError
from .parameters import ViewParameters
from .views import Views

ImageViews: TypeAlias = Tensor | tuple[Tensor, ...]
"""Views [B, V, C, S, S]; of several sizes: one such tensor for each, those of the global views first."""


class MultiCrop(nn.Module):
    """uint8 [B, C, H, W] -> (float [B, G, C, S, S], float [B, L, C, s, s]): global and local views, s <= S.

    What `Views` has, for both of its parts. The global views are those that their part draws alone with the same
    seed; the local ones have random streams of their own.
    """

    def __init__(self, global_views: Views, local_views: Views) -> None:
        """Raises ConfigError for local views that are larger than the global ones."""
        super().__init__()
        if local_views.image_size > global_views.image_size:
            raise ConfigError(
                f"augment.local.image_size={local_views.image_size}: local views are larger than the global ones, "
                f"which have {global_views.image_size} pixels a side; lower it"
            )
        self.global_views, self.local_views = global_views, local_views

    @property
    def parts(self) -> tuple[Views, Views]:
        return self.global_views, self.local_views

    @property
    def channels(self) -> int:
        return self.global_views.channels

    @property
    def left_out(self) -> str:
        """See `Views.left_out`."""
        return self.global_views.left_out

    def forward(self, images: Tensor) -> ImageViews:
        """Draw, then render: see `Views.forward`."""
        return self.render(images, self.draw(len(images), images.shape[-2], images.shape[-1]))

    def draw(self, batch: int, height: int, width: int) -> tuple[ViewParameters, ...]:
        """Random parameters of both parts, for `batch` images of this size in pixels."""
        return tuple(part.draw(batch, height, width) for part in self.parts)

    def select(self, parameters: tuple[ViewParameters, ...], images: slice) -> tuple[ViewParameters, ...]:
        """The parameters of these images of the batch."""
        return tuple(part.select(own, images) for part, own in zip(self.parts, parameters, strict=True))

    def render(self, images: Tensor, parameters: tuple[ViewParameters, ...]) -> ImageViews:
        """The views with these parameters; draws no random numbers."""
        return tuple(part.render(images, own) for part, own in zip(self.parts, parameters, strict=True))

    def reseed(self, seed: int) -> None:
        """Start all generators anew, seed >= 0: what is drawn from here on depends on `seed` alone."""
        self.global_views.reseed(seed)
        own = np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1, np.uint64)
        self.local_views.reseed(int(own[0]))

    def denormalize(self, views: Tensor) -> Tensor:
        """Normalized views [..., C, S, S] of either size -> pixels in 0..1."""
        return self.global_views.denormalize(views)
