"""What every loader can be told: how it works, what it does with damage, whether it crops while decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigError

OnCorrupt = Literal["fail", "replace"]


@dataclass(frozen=True)
class CropOptions:
    """Random resized crops, taken from the image as it is stored, while it is decoded.

    A loader that is given these serves uint8 [B, views, C, image_size, image_size]. scale: range of the crop's
    share of the area; ratio: range of its width / height. Raises ConfigError for values that make no sense.
    """

    views: int
    image_size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if self.views < 1 or self.image_size < 1:
            raise ConfigError(f"crops need views >= 1 and image_size >= 1, not {self.views} and {self.image_size}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"crop scale must be [low, high] within (0, 1], not {list(self.scale)}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"crop ratio must be [low, high] above 0, not {list(self.ratio)}")


@dataclass(frozen=True)
class LoaderOptions:
    """workers: processes or threads that decode, per rank; the resident loader needs none while it serves.

    timeout_s: longest wait for one batch, in seconds, before LoaderDied. on_corrupt: what becomes of an image
    that does not decode: `fail` raises CorruptSample, `replace` serves another one in its place.
    """

    workers: int = 2
    timeout_s: float = 120.0
    on_corrupt: OnCorrupt = "fail"
    crop: CropOptions | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"data.workers must be at least 1, not {self.workers}")
        if not self.timeout_s > 0:
            raise ConfigError(f"data.timeout_s must be above 0 seconds, not {self.timeout_s}")
        if self.on_corrupt not in ("fail", "replace"):
            raise ConfigError(f"data.on_corrupt must be fail or replace, not {self.on_corrupt!r}")
