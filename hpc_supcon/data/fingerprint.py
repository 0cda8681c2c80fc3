"""What a data set is, in a few hundred bytes: two ranks, or a run and its checkpoint, compare it without decoding.

Files count by class, name and size and by the first bytes of a sample of them, never by the folder that the set lies
in nor by the time of their last change: a set that was copied elsewhere is the same set.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .sources.beton import BetonSource, labels_digest, read_manifest
from .sources.datasets import DatasetSource
from .sources.encoded import EncodedSource
from .sources.file_sizes import THREADS, IntArray, file_sizes
from .sources.folder import FolderSource
from .sources.source import ArraySource, Source
from .sources.splits import Splits

FileSizes = Callable[[Sequence[Path]], IntArray]
"""Files -> their sizes in bytes, int64 [n]; -1 where there is no regular file."""

SAMPLE, SAMPLE_BYTES = 256, 16 << 10
"""So many files of a split are read, this many bytes of each: names and sizes may be equal where images are not."""
ITEM_SAMPLE = 64
"""So many items of a split of a torch Dataset are read."""
SHOWN = 3
"""Classes that are named where more differ."""
FILES, BETON, PIXELS = "image files", ".beton files", "arrays of pixels"
ITEMS, ENCODED = "items of a dataset", "images in archives"


@dataclass(frozen=True)
class SplitFingerprint:
    """One split; texts are sha256, empty where a kind of source has no such thing."""

    counts: tuple[int, ...]
    """Images of each class, in the order of the classes."""
    labels: str
    """Of all labels in order, int64."""
    names: str = ""
    """Of the names of the files in order."""
    sizes: str = ""
    """Of their sizes in order."""
    content: str = ""
    """Of all pixels, of the .beton file, or of the first bytes of a sample of the files."""

    @property
    def images(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class DataFingerprint:
    """A data set with its splits; equal for equal data on any machine. Made by `fingerprint`."""

    kind: str
    """FILES, BETON, PIXELS, ITEMS or ENCODED."""
    classes: tuple[str, ...]
    splits: dict[str, SplitFingerprint]
    """By name (train, validation, test), those that the set has."""

    def as_json(self) -> dict[str, Any]:
        """Plain data for a state.json; see `from_json`."""
        return asdict(self) | {"classes": list(self.classes)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> DataFingerprint:
        """What `as_json` returned, also after a way through JSON. Raises KeyError, TypeError or ValueError."""
        splits = {
            str(name): SplitFingerprint(**{**split, "counts": tuple(int(n) for n in split["counts"])})
            for name, split in data["splits"].items()
        }
        return DataFingerprint(str(data["kind"]), tuple(str(name) for name in data["classes"]), splits)

    def differences(self, other: DataFingerprint) -> list[str]:
        """What this data set has that `other` has not, and the other way round, one phrase each; empty where both
        are equal. Read as "... than in the other"."""
        classes = class_differences(self.classes, other.classes)
        if self.kind != other.kind:
            return [*classes, f"{self.kind} in place of {other.kind}"]
        gone = [f"no {name} split" for name in other.splits if name not in self.splits]
        added = [f"a {name} split" for name in self.splits if name not in other.splits]
        both = [name for name in self.splits if name in other.splits]
        return [*classes, *gone, *added, *(part for name in both if (part := self._split_difference(name, other)))]

    def _split_difference(self, name: str, other: DataFingerprint) -> str:
        mine, theirs = self.splits[name], other.splits[name]
        if mine == theirs:
            return ""
        counts = self._count_differences(name, other)
        if mine.images != theirs.images:
            missing = theirs.images - mine.images
            more = "fewer" if missing > 0 else "more"
            what = f"{abs(missing):,} image{'s' * (abs(missing) > 1)} {more} in {name}"
            return f"{what} ({mine.images:,}, not {theirs.images:,}{counts})"
        if self.classes == other.classes and mine.labels != theirs.labels:
            return f"other labels in {name}{counts}"
        if self.kind != FILES:
            is_other = (mine.sizes, mine.content) != (theirs.sizes, theirs.content)
            return f"other {self.kind} in {name}" if is_other else ""
        if mine.names != theirs.names:
            return f"files of other names in {name}"
        if mine.sizes != theirs.sizes:
            return f"files of another size in {name}"
        return f"files of another content in {name}" if mine.content != theirs.content else ""

    def _count_differences(self, name: str, other: DataFingerprint) -> str:
        """`; cat: 28, not 32` for the classes that both have in other numbers."""
        if not (self.classes and other.classes):
            return ""
        theirs = dict(zip(other.classes, other.splits[name].counts, strict=True))
        pairs = zip(self.classes, self.splits[name].counts, strict=True)
        parts = [f"{c}: {n:,}, not {theirs[c]:,}" for c, n in pairs if c in theirs and n != theirs[c]]
        return "".join(f"; {part}" for part in _first(parts))


def class_differences(mine: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """How the classes `mine` differ from `theirs`, one phrase each; empty where they and their order are the same."""
    if bool(mine) != bool(theirs):
        return ["labels added" if mine else "no labels"]
    parts = []
    for what, names, others in (("added", mine, theirs), ("missing", theirs, mine)):
        known = set(others)
        if different := [name for name in names if name not in known]:
            word = "class" if len(different) == 1 else "classes"
            parts.append(f"{word} {what}: {', '.join(_first(different))}")
    if not parts and list(mine) != list(theirs):
        position = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
        parts.append(f"classes in another order: class {position} is {mine[position]}, not {theirs[position]}")
    return parts


def _first(parts: list[str]) -> list[str]:
    return parts if len(parts) <= SHOWN + 1 else [*parts[:SHOWN], f"and {len(parts) - SHOWN:,} more"]


def fingerprint(splits: Splits, sizes: FileSizes | None = None) -> DataFingerprint:
    """The fingerprint of a data set. Decodes nothing but a few items of a torch Dataset and raises for no image: what
    cannot be read counts as such, and its reader names it.

    sizes: what finds the sizes of files; by default `file_sizes`.
    """
    sources = {name: source for name, source in vars(splits).items() if source is not None}
    kinds = {_kind(source) for source in sources.values()}
    assert len(kinds) == 1, kinds
    parts = {name: _split(source, sizes or file_sizes) for name, source in sources.items()}
    return DataFingerprint(kinds.pop(), splits.classes, parts)


def _kind(source: Source) -> str:
    kinds = {FolderSource: FILES, BetonSource: BETON, DatasetSource: ITEMS, EncodedSource: ENCODED}
    return next((kind for cls, kind in kinds.items() if isinstance(source, cls)), PIXELS)


def _split(source: Source, sizes: FileSizes) -> SplitFingerprint:
    labels = source.labels.numpy()
    counts = tuple(np.bincount(labels, minlength=len(source.classes)).tolist())
    digest = labels_digest(labels)
    if isinstance(source, FolderSource):
        names = hashlib.sha256()
        for path in source.paths:
            names.update(os.fsencode(path.name) + b"\0")
        in_bytes = sizes(source.paths)
        return SplitFingerprint(counts, digest, names.hexdigest(), _of(in_bytes), _sample(source.paths, in_bytes))
    if isinstance(source, BetonSource):
        file = str(read_manifest(source.path)["sha256"]).encode()
        content = hashlib.sha256(file + source.rows.astype("<i8").tobytes()).hexdigest()
        return SplitFingerprint(counts, digest, content=content)
    if isinstance(source, EncodedSource):
        known = source.sizes()
        return SplitFingerprint(
            counts, digest, sizes="" if known is None else _of(known), content=_encoded_sample(source)
        )
    if isinstance(source, DatasetSource):
        return SplitFingerprint(counts, digest, content=_item_sample(source))
    assert isinstance(source, ArraySource)
    images = source.stack().contiguous()
    pixels = hashlib.sha256(str(tuple(images.shape)).encode())
    pixels.update(images.numpy().data)
    return SplitFingerprint(counts, digest, content=pixels.hexdigest())


def _of(numbers: IntArray) -> str:
    return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()


def _strided(n: int, sample: int) -> list[int]:
    """At most `sample` of 0..n-1, evenly strided."""
    return sorted({i * n // sample for i in range(sample)}) if n else []


def _item_sample(source: DatasetSource) -> str:
    """sha256 of the pixels of evenly strided items, in order."""
    digest = hashlib.sha256()
    for i in _strided(len(source), ITEM_SAMPLE):
        try:
            pixels = source.read(i).numpy().tobytes()
        except DataError:
            pixels = b""
        digest.update(len(pixels).to_bytes(8, "little") + pixels)
    return digest.hexdigest()


def _encoded_sample(source: EncodedSource) -> str:
    """sha256 of the sizes and first bytes of evenly strided images, in order."""
    digest = hashlib.sha256()
    for i in _strided(len(source), SAMPLE):
        try:
            data = source.data(i)
        except DataError:
            data = b""
        digest.update(len(data).to_bytes(8, "little") + data[:SAMPLE_BYTES])
    return digest.hexdigest()


def _sample(paths: Sequence[Path], sizes: IntArray) -> str:
    """sha256 of the first bytes of evenly strided files, in order."""
    chosen = _strided(len(paths), SAMPLE)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as pool:
        for head in pool.map(_head, [paths[i] for i in chosen if sizes[i] >= 0]):
            digest.update(len(head).to_bytes(8, "little") + head)
    return digest.hexdigest()


def _head(path: Path) -> bytes:
    with suppress(OSError), path.open("rb") as file:
        return file.read(SAMPLE_BYTES)
    return b""
