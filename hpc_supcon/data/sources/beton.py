"""FFCV's .beton files: one per split, memory-mapped, each with a manifest that shows whether it is complete.

FFCV itself opens a .beton that is truncated or damaged without an error. Here a file is only read when its size
and sha256 are those in its manifest OUT.beton.json.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ...errors import DataError
from .decoded import DecodedSource
from .image_file import MODE_OF_CHANNELS, Exif, named, open_image
from .source import channels_error

FORMAT = "hpc-supcon beton 1"
JPEG, RAW = 0, 1
INT_FIELD, IMAGE_FIELD = 1, 2

# Version 2 of FFCV's format (ffcv/types.py, ffcv/fields/), little-endian.
VERSION = 2
HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table_ptr", "<u8")],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
SAMPLES_AT = HEADER.itemsize + 2 * FIELD.itemsize
"""Offset of the table of samples: after the header and the descriptions of `image` and `label`."""

SampleColumns = dict[str, npt.NDArray[Any]]


class BetonSource(DecodedSource):
    """Source over a .beton file, whose images are decoded whenever they are read. Made by `open_beton`.

    `columns`: mode, width, height, ptr and size of every sample of the FILE; `rows`: int64 [N], which of them
    are the images of this source. `paths` is None: a .beton file does not name the files that it was made of.
    """

    def __init__(
        self,
        path: Path,
        columns: SampleColumns,
        rows: npt.NDArray[np.int64],
        labels: Tensor,
        classes: Sequence[str],
        channels: int,
        image_size: int,
    ) -> None:
        super().__init__(labels, classes, channels, image_size)
        self.path, self.columns, self.rows = path, columns, rows
        self._bytes: npt.NDArray[np.uint8] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_bytes": None}  # a worker process maps the file itself

    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        """The whole file, memory-mapped and read-only."""
        if self._bytes is None:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        return self._bytes

    def pil_image(self, i: int) -> Image.Image:
        """See Source.pil_image. Raises CorruptSample."""
        row = int(self.rows[i])
        mode, width, height, ptr, size = (
            int(self.columns[k][row]) for k in ("mode", "width", "height", "ptr", "size")
        )
        data = self.bytes[ptr : ptr + size]
        with named(f"{self.path}: sample {row}"):
            if mode == RAW:
                image = Image.fromarray(data.reshape(height, width, 3))
            else:
                image = open_image(io.BytesIO(data.tobytes()))
            return image.convert(MODE_OF_CHANNELS[self.channels])

    def subset(self, indices: Tensor | Sequence[int]) -> BetonSource:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return BetonSource(
            self.path,
            self.columns,
            self.rows[chosen.numpy()],
            self.labels[chosen],
            self.classes,
            self.channels,
            self.image_size,
        )


def open_beton(
    path: str | Path,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    name: str | None = None,
    exif: Exif | None = None,
    check_hash: bool = True,
) -> BetonSource:
    """The images of a .beton file that `convert` wrote.

    image_size: what images are resized and cropped to (see `resize_and_crop`); needed where sizes are mixed.
    channels: 1 or 3; gray images can be read as RGB. name: the data set that the file must contain, as given to
    `convert`. exif: how the images of a folder must have been read; None: in any way. check_hash: read the whole file
    (about a second per gigabyte) and compare its sha256; of the ranks that share a file, one is enough.

    Raises DataError naming the file when it or its manifest is missing, truncated, damaged, or of another data set.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if name is not None and manifest["name"] != name:
        raise DataError(
            f"{path} contains {manifest['name']!r}, not {name!r}: name the right file or convert it again"
        )
    _check_pixels(path, manifest, channels, exif)
    _check_bytes(path, manifest, check_hash=check_hash)
    samples, allocations = _read_tables(path, manifest)
    labels = samples["label"].astype(np.int64)
    if labels_digest(labels) != manifest["labels_sha256"]:
        raise DataError(f"{path}: its labels differ from those in its manifest: convert it again")
    stored = manifest["image_size"]
    if image_size is None and not isinstance(stored, int):
        raise DataError(f"{path} contains images of mixed sizes: set data.image_size")
    columns: SampleColumns = {key: np.ascontiguousarray(samples["image"][key]) for key in ("mode", "width", "height")}
    columns["ptr"] = samples["image"]["data_ptr"].astype(np.int64)
    by_ptr = np.argsort(allocations["ptr"])
    found = by_ptr[np.searchsorted(allocations["ptr"][by_ptr], columns["ptr"])]
    columns["size"] = allocations["size"][found].astype(np.int64)
    return BetonSource(
        path,
        columns,
        np.arange(len(labels)),
        torch.from_numpy(labels),
        manifest["classes"],
        channels or manifest["channels"],
        image_size or stored,
    )


def manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def read_manifest(path: Path) -> dict[str, Any]:
    """What `convert` wrote about the file. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path} does not exist: make it with `hpc-supcon convert`")
    file = manifest_path(path)
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} has no manifest {file.name}: its conversion was not finished; convert it again"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"manifest {file} is damaged ({error}): convert {path.name} again") from error
    keys = {"name", "samples", "bytes", "sha256", "labels_sha256", "classes", "channels", "image_size"}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not keys <= manifest.keys():
        raise DataError(f"manifest {file} is not one of {FORMAT!r}: convert {path.name} again")
    return manifest


def digest_of(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 23):
            digest.update(block)
    return digest.hexdigest()


def labels_digest(labels: npt.NDArray[np.int64]) -> str:
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


def _check_pixels(path: Path, manifest: dict[str, Any], channels: int | None, exif: Exif | None) -> None:
    if channels is not None and channels not in MODE_OF_CHANNELS:
        raise channels_error(f"{path} has images of", manifest["channels"], channels)
    if channels == 1 and manifest["channels"] == 3:
        raise DataError(f"{path} holds RGB images, not gray ones: convert the data again with data.channels=1")
    # files written before images were turned have no such entry; sets that are no folders have no EXIF data
    of_folder = "exif" in manifest or str(manifest["name"]).startswith("image_folder/")
    stored = manifest.get("exif", "ignore")
    if of_folder and exif is not None and stored != exif:
        what = "turned upright (data.exif=transpose)" if stored == "transpose" else "as stored (data.exif=ignore)"
        raise DataError(
            f"{path} holds images {what}, not those of data.exif={exif}: convert the data again with "
            f"data.exif={exif}, or train with data.exif={stored}"
        )


def _check_bytes(path: Path, manifest: dict[str, Any], *, check_hash: bool) -> None:
    size = path.stat().st_size
    if size != manifest["bytes"]:
        raise DataError(f"{path} has {size} bytes, but {manifest['bytes']} were written: convert it again")
    if check_hash and digest_of(path) != manifest["sha256"]:
        raise DataError(f"{path} is damaged: its sha256 differs from that in its manifest; convert it again")


def _read_tables(path: Path, manifest: dict[str, Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    header = np.fromfile(path, dtype=HEADER, count=1)[0]
    if (header["version"], header["num_fields"], header["num_samples"]) != (VERSION, 2, manifest["samples"]):
        raise DataError(f"{path} is not a .beton file of {manifest['samples']} images and labels: convert it again")
    samples = np.fromfile(path, dtype=SAMPLE, count=manifest["samples"], offset=SAMPLES_AT)
    return samples, np.fromfile(path, dtype=ALLOCATION, offset=int(header["table_ptr"]))
