"""The .beton files of one data set: one file for each split, PATH/NAME.SPLIT.beton."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import ConfigError, DataError
from .beton import BetonSource, open_beton, read_manifest
from .image_file import Exif


def split_file(beton: Path, split: str) -> Path:
    """PATH/NAME.beton -> PATH/NAME.SPLIT.beton. Raises ConfigError for another suffix."""
    if beton.suffix != ".beton":
        raise ConfigError(f"data.beton must end in .beton, not be called {beton.name}")
    return beton.with_name(f"{beton.stem}.{split}.beton")


def open_beton_splits(
    beton: str | Path,
    name: str,
    *,
    image_size: int | None,
    channels: int | None,
    exif: Exif,
    has_labels: bool,
    check_hash: bool,
) -> tuple[BetonSource, BetonSource | None, BetonSource | None]:
    """(train, validation or None, test or None) of the files that the data set `name` was converted to.

    beton: PATH/NAME.beton, see `split_file`. Other arguments: see `open_beton`. has_labels: whether the images must
    have labels, or must have none. Raises DataError.
    """
    files = {split: split_file(Path(beton).expanduser(), split) for split in ("train", "validation", "test")}
    written = _written_together(files)

    def open_split(split: str) -> BetonSource:
        return open_beton(
            files[split],
            image_size=image_size,
            channels=channels,
            name=f"{name}/{split}",
            exif=exif,
            check_hash=check_hash,
        )

    train = open_split("train")
    if bool(train.classes) != has_labels:
        holds, use = ("labels", "folders") if train.classes else ("images without labels", "none")
        raise DataError(f"{files['train']} holds {holds}: use data.labels={use}")
    validation = open_split("validation") if "validation" in written else None
    return train, validation, open_split("test") if "test" in written else None


def _written_together(files: Mapping[str, Path]) -> list[str]:
    """The splits of the conversion that wrote the file of train: one of another conversion may lie beside it.

    Manifests of 0.1 do not name them; then every file that exists is one. Raises DataError where test is of another.
    """
    train = read_manifest(files["train"]).get("splits")
    if train is not None and "test" not in train:
        return list(train)
    test = read_manifest(files["test"]).get("splits")
    if train != test:
        raise DataError(
            f"{files['train']} and {files['test'].name} are of different conversions: convert the data again"
        )
    return [split for split, file in files.items() if file.exists()] if train is None else train
