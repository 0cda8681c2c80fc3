"""A file that really drops the zeros: per tensor the smallest of three forms, in one safetensors file.

    dense     values/NAME
    bitmap    values/NAME (those that are not zero), bitmap/NAME (uint8 [ceil(n / 8)], lowest bit first)
    indices   values/NAME, indices/NAME (int32 or int64, increasing, into the flattened tensor)

The metadata entry `tensors` is JSON, name -> [form, shape]; `sha256` is over the stored tensors.
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
"""About what one more tensor costs in the header: a form must save more than that."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def save_sparse(state: Mapping[str, Tensor], path: Path) -> int:
    """Write a state dict; returns the file's bytes. Only +0 is dropped, so that `load_sparse` is bit-equal.

    Raises RunFolderError.
    """
    stored: dict[str, Tensor] = {}
    forms: dict[str, tuple[str, list[int]]] = {}
    for name, tensor in state.items():
        form, parts = _encode(tensor.detach().cpu().contiguous())
        forms[name] = (form, list(tensor.shape))
        stored |= {f"{part}/{name}": value for part, value in parts.items()}
    about = {"format": FORMAT, "tensors": json.dumps(forms), "sha256": _sha256(stored)}
    payload = safetensors.torch.save(stored, metadata=about)
    try:
        write_atomically(path, payload)
    except OSError as error:
        raise RunFolderError(f"{path}: not written ({len(payload):,} bytes): {error.strerror}") from None
    return len(payload)


def load_sparse(path: Path) -> dict[str, Tensor]:
    """The state dict that `save_sparse` was given, dense, on the CPU, bit for bit. Raises CheckpointCorrupt."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointCorrupt(f"{path}: cannot be read: {error}") from None
    if about.get("format") != FORMAT:
        raise CheckpointCorrupt(f"{path}: not a file of sparse weights ({FORMAT})")
    if _sha256(stored) != about.get("sha256"):
        raise CheckpointCorrupt(f"{path}: its bytes changed since it was written (sha256 differs)")
    try:
        forms: dict[str, Any] = json.loads(about["tensors"])
        return {name: _decode(name, form, tuple(shape), stored) for name, (form, shape) in forms.items()}
    except (ValueError, KeyError, TypeError, RuntimeError, IndexError) as error:
        raise CheckpointCorrupt(f"{path}: its parts do not fit together: {error}") from None


def _encode(tensor: Tensor) -> tuple[str, dict[str, Tensor]]:
    flat, width = tensor.flatten(), tensor.element_size()
    dense = {"values": tensor.clone()}  # tensors that share memory have no place in a safetensors file
    kept = flat.view(_BITS[width]) != 0
    n, values = len(flat), int(kept.sum()) * width
    index = torch.int32 if n < 2**31 else torch.int64
    costs = {
        "dense": n * width,
        "bitmap": values + -(-n // 8) + HEADER_BYTES,
        "indices": values + int(kept.sum()) * index.itemsize + HEADER_BYTES,
    }
    form = min(costs, key=lambda name: costs[name])
    if form == "dense":
        return form, dense
    place = {"bitmap": pack(kept)} if form == "bitmap" else {"indices": kept.nonzero().flatten().to(index)}
    return form, {"values": flat[kept], **place}


def _decode(name: str, form: str, shape: tuple[int, ...], stored: Mapping[str, Tensor]) -> Tensor:
    values = stored[f"values/{name}"]
    if form == "dense":
        return values.view(shape)
    tensor = torch.zeros(shape, dtype=values.dtype)
    if form == "bitmap":
        tensor[unpack(stored[f"bitmap/{name}"], shape)] = values
    else:
        tensor.view(-1)[stored[f"{form}/{name}"].long()] = values
    return tensor


def _sha256(stored: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(stored):
        digest.update(key.encode())
        digest.update(stored[key].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


GZIP_LEVEL = 6


def measure(state: Mapping[str, Tensor], sparse: Path) -> dict[str, Any]:
    """Bytes of the safetensors file, of that file under gzip -6, and of the sparse file, written to `sparse`.

    {"dense_bytes", "gzip_bytes", "sparse_bytes", "ratio_gzip", "ratio_sparse"}: a ratio is dense bytes over those.
    Raises RunFolderError.
    """
    # a copy of each: safetensors refuses tensors that share memory
    payload = safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in state.items()})
    dense, zipped = len(payload), len(gzip.compress(payload, GZIP_LEVEL, mtime=0))
    written = save_sparse(state, sparse)
    return {
        "dense_bytes": dense,
        "gzip_bytes": zipped,
        "sparse_bytes": written,
        "ratio_gzip": round(dense / zipped, 4),
        "ratio_sparse": round(dense / written, 4),
    }
