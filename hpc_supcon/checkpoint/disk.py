"""Bytes to and from disk: hashed while they are written, flushed, and with named errors when the disk fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointCorrupt, RunFolderError

PIECE = 16 << 20
"""Bytes of one write: what was hashed is then still in the processor's cache when it is written."""

# https://github.com/huggingface/safetensors#format
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Content:
    """The content of a file to write: its length, and its bytes in pieces, so that no second copy is made."""

    size: int
    """Bytes."""
    pieces: Iterable[bytes | memoryview]


def json_content(data: Mapping[str, Any]) -> Content:
    payload = to_json(data)
    return Content(len(payload), [payload])


def tensor_content(named: Mapping[str, Tensor]) -> Content:
    """A safetensors file of tensors of any shape, device and layout (written row-major).

    Pieces are made when they are read; a contiguous tensor on the CPU is not copied. Tensors that share memory are
    each written.
    """
    # wide dtypes first, so that every tensor is aligned
    ordered = sorted(named.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, t in ordered:
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return Content(len(head) + end, _with_head(head, [t for _, t in ordered]))


def _with_head(head: bytes, tensors: list[Tensor]) -> Iterator[bytes | memoryview]:
    yield head
    for t in tensors:
        if t.numel():
            yield t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_file(path: Path, content: Content) -> dict[str, Any]:
    """Write and flush a new file; its manifest entry {"bytes", "sha256"}. Raises OSError."""
    digest = hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in content.pieces:
            whole = memoryview(piece)
            for start in range(0, len(whole), PIECE):
                part = whole[start : start + PIECE]
                digest.update(part)
                while part:  # a nearly full disk may write only a part
                    part = part[os.write(handle, part) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return {"bytes": content.size, "sha256": digest.hexdigest()}


def open_plain(path: Path) -> tuple[int, int]:
    """(handle, size in bytes) of an ordinary file. Raises CheckpointCorrupt for a link, a pipe, a folder or a missing
    file: links are not followed, because a checkpoint's files must be in its folder."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = "a link, not a file" if error.errno == errno.ELOOP else error.strerror
        raise CheckpointCorrupt(f"{path}: {reason}") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise CheckpointCorrupt(f"{path}: not a file")
    return handle, found.st_size


def read_file(path: Path, *, limit: int | None = None) -> bytes:
    """All bytes of an ordinary file of at most `limit` bytes. Raises CheckpointCorrupt."""
    handle, size = open_plain(path)
    with open(handle, "rb", buffering=0) as file:  # noqa: PTH123 (a handle, not a path)
        if limit is not None and size > limit:
            raise CheckpointCorrupt(f"{path}: {size} bytes, more than the {limit} this file can have")
        try:
            return file.readall()
        except OSError as error:
            raise CheckpointCorrupt(f"{path}: {error.strerror}") from None


def hash_file(path: Path) -> str:
    """sha256 of an ordinary file, read in pieces. Raises CheckpointCorrupt."""
    digest = hashlib.sha256()
    handle, _ = open_plain(path)
    with open(handle, "rb", buffering=0) as file:  # noqa: PTH123
        try:
            while piece := file.read(PIECE):
                digest.update(piece)
        except OSError as error:
            raise CheckpointCorrupt(f"{path}: {error.strerror}") from None
    return digest.hexdigest()


def free_bytes(folder: Path) -> int | None:
    """Bytes that an ordinary user can still write on the folder's disk; None where this is unknown."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else None


def check_space(folder: Path, needed: int) -> None:
    """Raise the OSError of a full disk when `needed` bytes cannot fit, before anything is written."""
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def not_written(path: Path, error: OSError, needed: int) -> RunFolderError:
    """The error for a save that failed."""
    free = free_bytes(path.parent)
    return RunFolderError(
        f"{path}: checkpoint not written: {error.strerror or error}; it needs {needed:,} bytes, "
        f"{'an unknown number' if free is None else f'{free:,}'} are free; earlier checkpoints are kept"
    )


def to_json(data: Mapping[str, Any]) -> bytes:
    """JSON as bytes, in the only form that `from_json` accepts."""
    return json.dumps(data, indent=1, sort_keys=True).encode()


def from_json(payload: bytes) -> dict[str, Any]:
    """The mapping for which `to_json` returns exactly these bytes. Raises ValueError.

    Comparing bytes also refuses duplicate keys, other encodings and spaces, which parsing accepts.
    """
    try:
        data = json.loads(payload)
        if isinstance(data, dict) and to_json(data) == payload:
            return data
    except RecursionError:
        pass
    raise ValueError("not the JSON that was written")


def seal(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the sha256 of its own JSON, so that a changed byte can be detected."""
    return {**data, "sha256": hashlib.sha256(to_json(data)).hexdigest()}


def unseal(payload: bytes) -> dict[str, Any]:
    """The data that `seal` was given. Raises ValueError when it has changed since."""
    data = from_json(payload)
    claimed = data.pop("sha256", None)
    if seal(data)["sha256"] != claimed:
        raise ValueError("changed since it was written")
    return data
