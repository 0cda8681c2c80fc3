"""Rules of views: how many an image has, of which sizes, and the losses that compare them without labels."""

from __future__ import annotations

from typing import get_args

from ..errors import ConfigError
from .schema import Config, names

CONTRASTIVE = frozenset(get_args(names.ContrastiveName))
OF_VIEWS = frozenset(get_args(names.OfViewsName))
WITH_PREDICTOR = frozenset(get_args(names.PredictorName))
MULTI_CROP = frozenset(get_args(names.MultiCropName))


def check_views(config: Config) -> None:
    """Raise ConfigError for views that the losses, the loader or the encoder cannot take."""
    _check_losses(config)
    _check_each_view(config)
    if config.data.crops[1]:
        _check_multi_crop(config)
        _check_local_views(config)


def _check_losses(config: Config) -> None:
    """The losses that compare views without labels."""
    terms = config.loss.weights.keys()
    for name in sorted(terms & OF_VIEWS):
        if config.data.crops[0] < 2:
            raise ConfigError(f"loss.name={name} compares an image's views: it needs data.views of 2 or more")
        if others := sorted((terms & (OF_VIEWS | CONTRASTIVE) - {name}) | set(config.loss.own)):
            raise ConfigError(
                f"loss.terms: {name} and {others[0]} would shape one projection in two ways; use one of them"
            )

    if config.optim.predictor_schedule != "same" and not terms & WITH_PREDICTOR:
        raise ConfigError(
            f"optim.predictor_schedule={config.optim.predictor_schedule}: {config.loss.label} trains no predictor, "
            f"as {' and '.join(sorted(WITH_PREDICTOR))} do; use same"
        )


def _check_each_view(config: Config) -> None:
    """Lists that have a value for each view."""
    count = config.data.crops[0]
    for name in ("blur", "solarize"):
        value = getattr(config.augment, name)
        if isinstance(value, tuple) and len(value) != count:
            raise ConfigError(
                f"augment.{name}={list(value)} has {len(value)} probabilities for data.views={count}: give one, or "
                "one for each (global) view"
            )


def _check_multi_crop(config: Config) -> None:
    """What takes views of two sizes."""
    data, what = config.data, f"data.views={config.data.views}".replace("'", "")
    if others := sorted(config.loss.weights.keys() - MULTI_CROP):
        raise ConfigError(
            f"{what}: {others[0]} takes views of one size: give their number, or use loss.name="
            f"{' or '.join(sorted(MULTI_CROP))}"
        )
    if data.crop_while_decoding:
        raise ConfigError(
            f"{what}: data.crop_while_decoding takes crops of one size; use data.crop_while_decoding=false"
        )
    if config.augment.policy == "none":
        raise ConfigError(f"{what}: augment.policy=none takes no crops; use another policy, such as simaugment")
    if config.model.encoder == "conv" and config.model.input_size is None:
        raise ConfigError(
            f"{what}: model.encoder=conv takes images of one size; use another encoder, or set model.input_size"
        )


def _check_local_views(config: Config) -> None:
    """Sizes of images that the data has are compared once they are known."""
    augment, image_size = config.augment, config.data.image_size
    local = augment.local
    if image_size is not None and local.image_size > image_size:
        raise ConfigError(
            f"augment.local.image_size={local.image_size}: local views are larger than the global ones, which have "
            f"data.image_size={image_size} pixels a side; lower it"
        )
    if not augment.is_padded and local.crop_scale[1] > augment.crop_scale[1]:
        raise ConfigError(
            f"augment.local.crop_scale={list(local.crop_scale)}: local crops may be larger than the global ones, of "
            f"augment.crop_scale={list(augment.crop_scale)}; lower it"
        )
