"""A safetensors file of a state dict without its zeros: each tensor in the smallest of three encodings.

    dense     values/NAME
    bitmap    values/NAME (those that are not zero), bitmap/NAME (uint8 [ceil(n / 8)], lowest bit first)
    indices   values/NAME, indices/NAME (int32 or int64, increasing, into the flattened tensor)

The metadata entry `tensors` is JSON, name -> [encoding, shape]; `sha256` is of the stored tensors.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointCorrupt, RunFolderError
from ..files import write_atomically
from .weight_masks import pack, unpack

FORMAT = "hpc_supcon.sparse.1"
HEADER_BYTES = 96
"""About what one more tensor adds to the header: an encoding must save more than that."""
GZIP_LEVEL = 6


def save_sparse(state: Mapping[str, Tensor], path: Path) -> int:
    """Write a state dict; returns the size of the file in bytes. Raises RunFolderError."""
    payload = to_sparse(state)
    write_sparse(path, payload)
    return len(payload)


def write_sparse(path: Path, payload: bytes) -> None:
    """Write what `to_sparse` returned. Raises RunFolderError."""
    try:
        write_atomically(path, payload)
    except OSError as error:
        raise RunFolderError(f"{path}: not written ({len(payload):,} bytes): {error.strerror}") from None


def to_sparse(state: Mapping[str, Tensor]) -> bytes:
    """The content of the file of a state dict.

    Only +0 is left out, so that `load_sparse` returns the same bits.
    """
    stored: dict[str, Tensor] = {}
    index: dict[str, tuple[str, list[int]]] = {}
    for name, tensor in state.items():
        encoding, parts = _encode(tensor.detach().cpu().contiguous())
        index[name] = (encoding, list(tensor.shape))
        stored |= {f"{part}/{name}": value for part, value in parts.items()}
    metadata = {"format": FORMAT, "tensors": json.dumps(index), "sha256": _sha256(stored)}
    return safetensors.torch.save(stored, metadata=metadata)


def load_sparse(path: Path) -> dict[str, Tensor]:
    """The dense state dict that `save_sparse` wrote, bit for bit, on the CPU. Raises CheckpointCorrupt."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointCorrupt(f"{path}: cannot be read: {error}") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointCorrupt(f"{path}: not a file of sparse weights ({FORMAT})")
    if _sha256(stored) != metadata.get("sha256"):
        raise CheckpointCorrupt(f"{path}: its bytes changed since it was written (sha256 differs)")
    try:
        index: dict[str, Any] = json.loads(metadata["tensors"])
        return {name: _decode(name, encoding, tuple(shape), stored) for name, (encoding, shape) in index.items()}
    except (ValueError, KeyError, TypeError, RuntimeError, IndexError) as error:
        raise CheckpointCorrupt(f"{path}: its parts do not fit together: {error}") from None


def _encode(tensor: Tensor) -> tuple[str, dict[str, Tensor]]:
    """(encoding, tensors to store by part) of a contiguous tensor."""
    flat, width = tensor.flatten(), tensor.element_size()
    n = len(flat)
    nonzero = (flat.view(torch.uint8).view(n, width) != 0).any(dim=1)  # by bits: -0.0 is not left out
    nnz = int(nonzero.sum())
    index_dtype = torch.int32 if n < 2**31 else torch.int64
    sizes = {
        "dense": n * width,
        "bitmap": nnz * width + -(-n // 8) + HEADER_BYTES,
        "indices": nnz * (width + index_dtype.itemsize) + HEADER_BYTES,
    }
    encoding = min(sizes, key=lambda name: sizes[name])
    if encoding == "dense":
        return encoding, {"values": tensor.clone()}  # safetensors refuses tensors that share memory
    if encoding == "bitmap":
        return encoding, {"values": flat[nonzero], "bitmap": pack(nonzero)}
    return encoding, {"values": flat[nonzero], "indices": nonzero.nonzero().flatten().to(index_dtype)}


def _decode(name: str, encoding: str, shape: tuple[int, ...], stored: Mapping[str, Tensor]) -> Tensor:
    values = stored[f"values/{name}"]
    if encoding == "dense":
        return values.view(shape)
    tensor = torch.zeros(shape, dtype=values.dtype)
    if encoding == "bitmap":
        tensor[unpack(stored[f"bitmap/{name}"], shape)] = values
    else:
        tensor.view(-1)[stored[f"{encoding}/{name}"].long()] = values
    return tensor


def _sha256(stored: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(stored):
        digest.update(key.encode())
        digest.update(stored[key].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def measure(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    """Sizes of the safetensors file, of that file under gzip -6, and of the sparse file; and the latter's content.

    {"dense_bytes", "gzip_bytes", "sparse_bytes", "ratio_gzip", "ratio_sparse"}: a ratio is dense bytes / those bytes.
    """
    # copies, because safetensors refuses tensors that share memory
    payload = safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in state.items()})
    dense, zipped = len(payload), len(gzip.compress(payload, GZIP_LEVEL, mtime=0))
    sparse = to_sparse(state)
    sizes = {
        "dense_bytes": dense,
        "gzip_bytes": zipped,
        "sparse_bytes": len(sparse),
        "ratio_gzip": round(dense / zipped, 4),
        "ratio_sparse": round(dense / len(sparse), 4),
    }
    return sizes, sparse
