"""Where the samples of a WebDataset tar lie: read once for each tar, then kept in a cache.

With the offset of every image, tars are read as a set of files: any rank reads any sample of any shard, so order,
epochs and resuming are those of every other source, and the sizes of shards do not matter. (A stream of shards serves
an epoch exactly once only where ranks and workers divide the shards, and resumes by reading again what it served.)
The package `webdataset`, which can only stream, says which files of a tar are a sample and expands patterns of names.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import DataError, first_line
from ...files import atomic_path
from .image_file import FORMATS
from .tables import Columns

VERSION = 1
BLOCK = 512
_SKIPPED = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset passes over as well."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_THREADS = 8
_IMAGES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
"""Arrays (.npy) are mapped into memory, which needs a file of their own."""


def index_of(shards: Sequence[Path], columns: Columns, *, has_labels: bool) -> list[Any]:
    """For each tar a pyarrow.Table: key, offset, size (of the image, in bytes) and label of every sample, in order.

    columns: image: the extension of the images, by default the only one in a sample that is of an image; label: that
    of the labels, by default `cls`; `json.NAME` is an entry of `json`. Tables are kept in the user's cache, by path,
    size and time of change of each tar, where it can be written. Raises DataError for a tar that is cut short or
    damaged, with its offset, and for a sample without image or label, with its key.
    """
    wanted = {"version": VERSION, "image": columns.image, "label": (columns.label or "cls") if has_labels else None}
    with _locked(_cache()) as cache, ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda shard: _indexed(shard, wanted, cache), shards))


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "hpc-supcon" / "tar-index"


@contextmanager
def _locked(folder: Path) -> Iterator[Path | None]:
    """The folder of the cache, locked for this process: other ranks on the node wait, then find what it wrote. None
    where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError:
        yield None
        return
    with lock:
        with suppress(OSError):  # a file system without locks: at worst an index is made twice
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _indexed(shard: Path, wanted: dict[str, Any], cache: Path | None) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    found = shard.stat()
    state = {**wanted, "path": os.fspath(shard.absolute()), "size": found.st_size, "mtime_ns": found.st_mtime_ns}
    name = hashlib.sha256(json.dumps(state, sort_keys=True).encode(errors="surrogateescape")).hexdigest()[:32]
    file = None if cache is None else cache / f"{name}.parquet"
    if file is not None and file.exists():
        with suppress(OSError, pa.ArrowException):  # damaged: it is made again
            return parquet.read_table(file)
    table = pa.table(dict(zip(("key", "offset", "size", "label"), _columns_of(shard, wanted), strict=True)))
    if file is not None:
        with suppress(OSError), atomic_path(file) as partial:  # a full disk
            parquet.write_table(table, partial)
    return table


def _columns_of(shard: Path, wanted: dict[str, Any]) -> tuple[Any, ...]:
    import pyarrow as pa
    from webdataset.tariterators import group_by_keys

    keys, offsets, sizes, labels = [], [], [], []
    with shard.open("rb") as file:
        try:
            for sample in group_by_keys(_members(shard, file)):
                where = f"{shard}, sample {sample['__key__']}"
                parts = {name: place for name, place in sample.items() if not name.startswith("__")}
                offset, size = parts[_image_part(parts, wanted["image"], where)]
                keys.append(sample["__key__"])
                offsets.append(offset)
                sizes.append(size)
                labels.append(None if wanted["label"] is None else _label(file, parts, wanted["label"], where))
        except ValueError as error:  # of group_by_keys: two files of one name in a sample
            raise DataError(f"{shard}: {first_line(error)}") from error
    kinds = (pa.string(), pa.int64(), pa.int64(), pa.string())
    return tuple(pa.array(column, kind) for column, kind in zip((keys, offsets, sizes, labels), kinds, strict=True))


def _members(shard: Path, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The regular files in a tar, as webdataset passes them on, but with (offset, size) in place of their bytes."""
    head, length = file.read(2), os.fstat(file.fileno()).st_size
    if head in _COMPRESSED:
        raise DataError(
            f"{shard} is compressed ({_COMPRESSED[head]}): its samples cannot be read one by one; unpack it to a .tar"
        )
    if length == 0:
        raise DataError(f"{shard} is empty")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            # offset 0: there is no member, and Python 3.10 would look for the next one before the file
            while tar.offset and (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                if member.isreg() and member.offset_data + member.size > length:
                    raise _cut_short(shard, member.offset, f"{member.name} of {member.size:,} bytes", length)
                if member.isreg() and not _SKIPPED.match(member.name):
                    place = (member.offset_data, member.size)
                    yield {"fname": member.name, "data": place, "__url__": os.fspath(shard)}
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(
            f"{shard} is damaged or cut short at offset {file.tell():,} ({first_line(error)}): copy it again"
        ) from error
    block = os.pread(file.fileno(), BLOCK, end)
    if len(block) < BLOCK:
        raise _cut_short(shard, end, "the mark of its end", length)
    if block.strip(b"\0"):
        raise DataError(f"{shard} is damaged at offset {end:,}: there is no header of a member; copy it again")


def _cut_short(shard: Path, offset: int, what: str, length: int) -> DataError:
    return DataError(
        f"{shard} is cut short: {what} at offset {offset:,} is beyond its end ({length:,} bytes); copy it again"
    )


def _image_part(parts: dict[str, Any], name: str | None, where: str) -> str:
    """The extension of the image of a sample."""
    found = (
        [part for part in parts if f".{part}".endswith(_IMAGES)] if name is None else [name] if name in parts else []
    )
    if len(found) == 1:
        return found[0]
    if name is None and found:
        raise DataError(f"{where}: it has several images ({', '.join(found)}): set data.columns.image")
    what = "no image" if name is None else f"no .{name} (data.columns.image)"
    raise DataError(f"{where}: it has {what}, but {', '.join(f'.{part}' for part in parts)}")


def _label(file: BinaryIO, parts: dict[str, Any], name: str, where: str) -> str:
    """The label of a sample as text: the content of NAME, or the entry KEY of `json` where name is `json.KEY`."""
    is_entry = name.startswith("json.") and name not in parts
    part = "json" if is_entry else name
    if part not in parts:
        raise DataError(
            f"{where}: it has no label .{part}, but {', '.join(f'.{one}' for one in parts)}: set data.columns.label "
            "(such as txt, or json.label for an entry of .json), or data.labels=none"
        )
    offset, size = parts[part]
    try:
        text = os.pread(file.fileno(), size, offset).decode()
        return str(json.loads(text)[name.removeprefix("json.")]) if is_entry else text.strip()
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: its label .{name} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
