"""Rules of the section `data`: where images are read from, and by what."""

from __future__ import annotations

from pathlib import PurePath
from typing import get_args

from ..errors import ConfigError
from .schema import Config, names

OWN_SOURCES = frozenset(get_args(names.OwnSourceName))
WITH_COLUMNS = {
    "image": ("manifest", "huggingface", "webdataset"),
    "label": ("manifest", "huggingface", "webdataset"),
    "split": ("manifest",),
}
"""Setting of data.columns -> the sources that have such columns."""


def check_data(config: Config) -> None:
    """Raise ConfigError where settings of the data contradict each other."""
    data = config.data
    _check_columns(config)
    if data.beton is not None and PurePath(data.beton).suffix != ".beton":
        raise ConfigError(f"data.beton={data.beton}: must end in .beton")
    if data.loader == "ffcv" and data.beton is None:
        raise ConfigError(
            "data.loader=ffcv reads .beton files: make them with `hpc-supcon convert DATA OUT.beton`, set data.beton"
        )
    if data.loader == "dali" and (data.source not in OWN_SOURCES or data.beton is not None):
        raise ConfigError(
            f"data.loader=dali reads image files: use data.source={', '.join(get_args(names.OwnSourceName))} "
            "and no data.beton"
        )
    if data.crop_while_decoding and data.image_size is None:
        raise ConfigError("data.crop_while_decoding needs data.image_size: the side of the crops")
    if data.crop_while_decoding and config.augment.policy == "none":
        raise ConfigError("data.crop_while_decoding crops at random, which augment.policy=none forbids")
    if data.crop_while_decoding and config.augment.is_padded:
        raise ConfigError(
            "data.crop_while_decoding takes resized crops, not padded ones (augment.policy, augment.crop)"
        )
    made = data.synthetic
    if data.source == "synthetic" and data.beton is None and made.images < made.classes:
        raise ConfigError(
            f"data.synthetic.images={made.images}: data.synthetic.classes={made.classes} need at least one image each"
        )


def _check_columns(config: Config) -> None:
    data = config.data
    for key, sources in WITH_COLUMNS.items():
        if getattr(data.columns, key) is not None and data.source not in sources:
            raise ConfigError(
                f"data.columns.{key}={getattr(data.columns, key)}: data.source={data.source} has no such column, but "
                f"{', '.join(sources)}: drop it"
            )
    if data.image_root is not None and data.source != "manifest":
        raise ConfigError(f"data.image_root={data.image_root}: that is of data.source=manifest, not {data.source}")
