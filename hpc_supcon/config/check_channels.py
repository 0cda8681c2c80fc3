"""Rules of images of other than 1 or 3 channels and of 16 bits, as far as the settings tell what the images are."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError
from .schema import Config

GRAY_OR_RGB = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")
"""Sources whose images are converted to 1 or 3 channels alone."""
PICTURE_LOADERS, PICTURE_POLICIES = ("ffcv", "dali"), ("autoaugment", "randaugment")
"""What takes 8-bit images of 1 or 3 channels alone; of images that no setting describes, the data say so later."""


def check_channels(config: Config, stages: Sequence[str]) -> None:
    """Raise ConfigError where the settings ask for what such images do not have."""
    data = config.data
    if data.source == "synthetic" and data.beton is None:
        _check_synthetic(config, stages)
        return
    if data.channels in (None, 1, 3):
        return
    given = f"data.channels={data.channels}"
    if data.source in GRAY_OR_RGB:
        raise ConfigError(f"{given}: the images of data.source={data.source} become 1 (gray) or 3 (RGB) channels")
    if data.beton is not None:
        raise ConfigError(f"{given}: .beton files hold images of 1 or 3 channels; use data.beton=null")
    _check_uses(config, stages, given)


def _check_synthetic(config: Config, stages: Sequence[str]) -> None:
    data, made = config.data, config.data.synthetic
    if data.channels not in (None, 1, 3, made.channels):
        raise ConfigError(
            f"data.channels={data.channels} but data.synthetic.channels={made.channels}: set only the second"
        )
    if made.bits == 16:
        _check_uses(config, stages, "data.synthetic.bits=16")
    if made.channels not in (1, 3):
        _check_uses(config, stages, f"data.synthetic.channels={made.channels}")


def _check_uses(config: Config, stages: Sequence[str], given: str) -> None:
    data, policy = config.data, config.augment.policy
    if data.loader in PICTURE_LOADERS:
        raise ConfigError(
            f"{given}: data.loader={data.loader} decodes 8-bit images of 1 or 3 channels; use resident or torch"
        )
    if policy in PICTURE_POLICIES:
        raise ConfigError(
            f"{given}: augment.policy={policy} changes 8-bit images of 1 or 3 channels; use flip_crop, pad_crop or "
            "simaugment"
        )
    if "probe" in stages and config.probe.corruption_names:
        raise ConfigError(f"{given}: probe.corruptions are for 8-bit images of 1 or 3 channels; use []")
