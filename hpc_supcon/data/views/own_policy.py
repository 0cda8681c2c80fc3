"""Policies of a user's own: operations on whole gray levels of cropped and flipped views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PartError
from ...parts import Part, run

VIEWS = 4
"""Made-up views on which a policy is tried."""
_SEEDS = 2**62


class OwnPolicy:
    """The callable that the part returns: (uint8 [n, C, S, S], generator) -> uint8 of the same shape.

    All that is random in it must be drawn from the torch.Generator, which is on the device of the views: views then
    follow from the run's seed, rank and step, and a resumed run has the same ones. It is called once for every piece
    of a batch that is rendered; the pieces of the two-pass step are rendered twice, with generators of the same seed.
    """

    def __init__(self, part: Part, options: Mapping[str, Any] | None, channels: int, image_size: int) -> None:
        """Raises PartError for one that does not do that with made-up views."""
        self._where = part.where
        self._call: Any = part.build(options)
        if not callable(self._call):
            raise PartError(f"{part.where}: returned {type(self._call).__name__}, which cannot be called on views")
        made_up = torch.randint(
            0, 256, (VIEWS, channels, image_size, image_size), generator=torch.Generator().manual_seed(0)
        ).to(torch.uint8)
        with torch.random.fork_rng(devices=[]):
            first, again = (self(made_up, 1) for _ in range(2))
        if not torch.equal(first, again):
            raise PartError(
                f"{self._where}: gives other views for a generator of the same seed: draw all that is random from "
                "the generator it is given, or a resumed run would see other views"
            )

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """A seed for each of n views, int64 [n]."""
        return torch.randint(_SEEDS, (n,), generator=generator)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        """uint8 [n, C, S, S] -> the same shape and device; `seed` of its generator. Raises PartError."""
        generator = torch.Generator(pixels.device).manual_seed(seed)
        if isinstance(self._call, nn.Module):
            self._call.to(pixels.device)
        changed = run(self._where, self._call, pixels.clone(), generator)
        if not isinstance(changed, Tensor) or changed.dtype != torch.uint8 or changed.shape != pixels.shape:
            is_tensor = isinstance(changed, Tensor)
            found = f"{changed.dtype} {list(changed.shape)}" if is_tensor else type(changed).__name__
            raise PartError(f"{self._where}: made {found} of torch.uint8 {list(pixels.shape)}: keep type and shape")
        return changed.to(pixels.device)
