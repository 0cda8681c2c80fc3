"""The commands `hpc-supcon convert | verify`: a data set as a run would read it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import resolve, validated
from ..config.schema.data import DataConfig
from ..errors import ConfigError, CorruptSample, printable
from ..terminal import warn
from .common import Debug, progress_bars

DataSettings = Annotated[
    list[str] | None,
    typer.Argument(metavar="data.key=value", help="Settings of the data, as a run takes them: data.channels=3."),
]


def data_settings(overrides: list[str] | None, *given: str) -> DataConfig:
    """The section `data` of a run with these overrides.

    given: settings that the command's own arguments name. Raises ConfigError for these, and for other sections.
    """
    data, origins = resolve("default", overrides or [])
    for key, origin in origins.items():
        if not key.startswith("data."):
            raise ConfigError(f"{origin}: this command takes settings of the data alone, such as data.channels=3")
        if key in given:
            raise ConfigError(f"{origin}: the command's own arguments say what {key} is; drop it")
    return validated(json.dumps(data), origins, "the settings").data


def _own_options(own: DataConfig) -> dict[str, Any]:
    """What SourceOptions takes of these settings."""
    from ..data import Columns

    keys = ("image_size", "channels", "exif", "labels", "image_root")
    return {key: getattr(own, key) for key in keys} | {"columns": Columns(**own.columns.model_dump())}


def _source_of(path: str) -> str:
    """The kind of data set that a path names by its form."""
    if path.startswith("hf:"):
        return "huggingface"
    if path.lower().endswith((".csv", ".tsv", ".parquet")):
        return "manifest"
    return "webdataset" if path.lower().endswith(".tar") else "image_folder"


def convert(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="An image folder, or a source: cifar10, manifest, webdataset ...")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.beton", help="Writes OUT.train.beton, OUT.test.beton ...")],
    settings: DataSettings = None,
    root: Annotated[Path | None, typer.Option(help="data.root: folder of a source that is no image folder.")] = None,
    download: Annotated[bool, typer.Option("--download", help="data.download=true: fetch a missing source.")] = False,
    max_size: Annotated[int | None, typer.Option(help="Longest side in px; larger images are shrunk.")] = None,
    jpeg_quality: Annotated[int | None, typer.Option(help="1..95; by default JPEG files are copied.")] = None,
    raw_fraction: Annotated[float, typer.Option(help="Share of images stored as pixels, 0..1.")] = 0.0,
    debug: Debug = False,
) -> None:
    """Write a data set as .beton files with manifests, for data.loader=ffcv (data.beton=OUT.beton)."""
    is_folder = "/" in data or Path(data).is_dir()
    own = data_settings(settings, "data.source", "data.beton", *["data.root"] * (is_folder or root is not None))
    from ..data import OWN_SOURCES, convert_splits, open_source

    name = "image_folder" if is_folder else data
    splits = open_source(
        name,
        data if is_folder else root or own.root,
        download=download or own.download,
        # files keep their sizes, mixed ones too: image_size is applied to them when they are read
        **(_own_options(own) | {"image_size": own.image_size or 1 if name in OWN_SOURCES else own.image_size}),
        synthetic=own.synthetic.model_dump() if name == "synthetic" else None,
        note=warn,
    )
    options = {"max_size": max_size, "jpeg_quality": jpeg_quality, "raw_fraction": raw_fraction}
    with progress_bars() as update:
        manifests = convert_splits(name, splits, out, progress=update, **options)
    for split, manifest in manifests.items():
        sys.stdout.write(f"{split}: {manifest['samples']} images, {manifest['bytes']:,} bytes\n")
    exif = f" data.exif={own.exif}" if name in OWN_SOURCES and own.exif != "transpose" else ""
    labels = " data.labels=none" if own.labels == "none" else ""
    sys.stdout.write(f"use: data.source={name} data.beton={printable(out)}{exif}{labels}\n")


def verify(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="An image folder, a manifest, a .beton, or what data.root is."),
    ],
    settings: DataSettings = None,
    debug: Debug = False,
) -> None:
    """Decode every image; list sizes, classes, and each image that training with these settings would refuse."""
    own = data_settings(settings, "data.beton", "data.root")
    named = any(text.startswith("data.source=") for text in settings or [])
    source = own.source if named else _source_of(str(path))
    from ..data import OWN_SOURCES
    from ..data.sources.verify import verify as verify_images

    if source not in OWN_SOURCES:
        raise ConfigError(
            f"data.source={source}: its files are checked when they are read; verify reads {', '.join(OWN_SOURCES)}"
        )
    with progress_bars() as update:
        reports = verify_images(
            str(path),
            source=source,
            progress=lambda done, total: update(printable(path.name), done, total),
            note=warn,
            **_own_options(own),
        )
    broken = 0
    for name, report in reports.items():
        sizes = ", ".join(f"{w}x{h}: {n}" for (w, h), n in sorted(report.sizes.items(), key=lambda x: -x[1])[:5])
        more = f" and {len(report.sizes) - 5} more sizes" if len(report.sizes) > 5 else ""
        classes = f"{len(report.classes)} classes" if report.classes else "no labels"
        sys.stdout.write(f"{printable(name)}: {report.images} images, {classes}, {sizes}{more}\n")
        for problem in report.problems:
            sys.stdout.write(f"  index {problem.index}: {problem.message}\n")
        broken += len(report.problems)
    if broken:
        raise CorruptSample(f"{path}: {broken} images cannot be used")
