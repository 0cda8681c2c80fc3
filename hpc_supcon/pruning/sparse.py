"""A safetensors file of a state dict without its zeros: each tensor in the smallest of three encodings.

    dense     values/NAME
    bitmap    values/NAME (those that are not zero), bitmap/NAME (uint8 [ceil(n / 8)], lowest bit first)
    indices   values/NAME, indices/NAME (int32 or int64, increasing, into the flattened tensor)

The metadata entry `tensors` is JSON, name -> [encoding, shape]; `sha256` is of the stored tensors. With values in
fewer bits (VALUES), the entry of each tensor that has them is [encoding, shape, dtype, scale]: the tensor is the
stored values times the scale, in that dtype.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
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
QUANTIZED_FORMAT = "hpc_supcon.sparse.2"
VALUES = ("same", "fp16", "int8")
"""How the values of weights (floating-point tensors of two and more dimensions) are stored: in their own dtype; in
half precision; or as whole numbers from -127 to 127, times one scale per tensor, which is the largest |value| / 127.
What half precision cannot hold, and NaN and Inf, stay in their own dtype."""
HEADER_BYTES = 96
"""About what one more tensor adds to the header: an encoding must save more than that."""
GZIP_LEVEL = 6
ZSTD_LEVEL = 3


def save_sparse(state: Mapping[str, Tensor], path: Path, *, values: str = "same") -> int:
    """Write a state dict, its values as one of VALUES; returns the file's size in bytes. Raises RunFolderError."""
    payload = to_sparse(state, values)
    write_sparse(path, payload)
    return len(payload)


def write_sparse(path: Path, payload: bytes) -> None:
    """Write what `to_sparse` returned. Raises RunFolderError."""
    try:
        write_atomically(path, payload)
    except OSError as error:
        raise RunFolderError(f"{path}: not written ({len(payload):,} bytes): {error.strerror}") from None


def to_sparse(state: Mapping[str, Tensor], values: str = "same") -> bytes:
    """The content of the file of a state dict, its values as one of VALUES.

    Only +0 is left out, so that `load_sparse` returns the same bits where the values are "same".
    """
    stored: dict[str, Tensor] = {}
    index: dict[str, list[Any]] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        compact, scale = _compact(tensor, values)
        encoding, parts = _encode(tensor, compact)
        index[name] = [encoding, list(tensor.shape)]
        if scale is not None:
            index[name] += [str(tensor.dtype).removeprefix("torch."), scale]
        stored |= {f"{part}/{name}": value for part, value in parts.items()}
    format = FORMAT if values == "same" else QUANTIZED_FORMAT
    metadata = {"format": format, "tensors": json.dumps(index), "sha256": _sha256(stored)}
    return safetensors.torch.save(stored, metadata=metadata)


def _compact(tensor: Tensor, values: str) -> tuple[Tensor, float | None]:
    """(the values in the dtype they are stored in, their scale; None: as they are)."""
    assert values in VALUES
    if values == "same" or not tensor.is_floating_point() or tensor.ndim < 2 or not tensor.numel():
        return tensor, None
    largest = float(tensor.abs().max())
    if not 0 < largest < math.inf or tensor.itemsize <= (1 if values == "int8" else 2):
        return tensor, None
    if values == "fp16":
        return (tensor.half(), 1.0) if largest <= torch.finfo(torch.float16).max else (tensor, None)
    scale = largest / 127
    return (tensor.double() / scale).round().clamp(-127, 127).to(torch.int8), scale


def load_sparse(path: Path) -> dict[str, Tensor]:
    """The dense state dict of a file that `save_sparse` wrote, on the CPU: the same bits if its values are "same".

    Raises CheckpointCorrupt."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointCorrupt(f"{path}: cannot be read: {error}") from None
    if metadata.get("format") not in (FORMAT, QUANTIZED_FORMAT):
        raise CheckpointCorrupt(f"{path}: not a file of sparse weights ({FORMAT})")
    if _sha256(stored) != metadata.get("sha256"):
        raise CheckpointCorrupt(f"{path}: its bytes changed since it was written (sha256 differs)")
    try:
        index: dict[str, Any] = json.loads(metadata["tensors"])
        return {
            name: _scaled(_decode(name, e, tuple(shape), stored), *how) for name, (e, shape, *how) in index.items()
        }
    except (ValueError, KeyError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise CheckpointCorrupt(f"{path}: its parts do not fit together: {error}") from None


def _scaled(tensor: Tensor, dtype: str | None = None, scale: float = 1.0) -> Tensor:
    if dtype is None:
        return tensor
    return (tensor.double() * scale).to(getattr(torch, dtype))


def _encode(tensor: Tensor, compact: Tensor) -> tuple[str, dict[str, Tensor]]:
    """(encoding, tensors to store by part) of a contiguous tensor; compact: its values as they are stored."""
    flat, stored = tensor.flatten(), compact.flatten()
    n, width = len(flat), compact.element_size()
    # by bits: -0.0 is not left out
    nonzero = (flat.view(torch.uint8).view(n, tensor.element_size()) != 0).any(dim=1)
    nnz = int(nonzero.sum())
    index_dtype = torch.int32 if n < 2**31 else torch.int64
    sizes = {
        "dense": n * width,
        "bitmap": nnz * width + -(-n // 8) + HEADER_BYTES,
        "indices": nnz * (width + index_dtype.itemsize) + HEADER_BYTES,
    }
    encoding = min(sizes, key=lambda name: sizes[name])
    if encoding == "dense":
        return encoding, {"values": compact.clone()}  # safetensors refuses tensors that share memory
    if encoding == "bitmap":
        return encoding, {"values": stored[nonzero], "bitmap": pack(nonzero)}
    return encoding, {"values": stored[nonzero], "indices": nonzero.nonzero().flatten().to(index_dtype)}


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


def measure(
    state: Mapping[str, Tensor], values: str = "same", *, original: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Any], bytes]:
    """Sizes of the safetensors file, of that file compressed, and of the sparse file; and the latter's content.

    {"dense_bytes", "gzip_bytes" (gzip -6), "zstd_bytes" (zstd -3), "sparse_bytes", "sparse_fp16_bytes",
    "sparse_int8_bytes", "original_bytes", "ratio_dense", "ratio_gzip", ..., "nonzero_share", "values", "error_fp16",
    "error_int8"}. original: the state dict before channels were removed, by default `state`; a ratio is original
    bytes (its safetensors file) / those bytes. nonzero_share is of all weights (see VALUES); an error is the root of
    the sum of squared differences of the weights over that of their squares. The content has its values as `values`
    says.
    """
    import zstandard

    payload = _dense(state)
    files = {how: to_sparse(state, how) for how in VALUES}
    sizes = {
        "dense": len(payload),
        "gzip": len(gzip.compress(payload, GZIP_LEVEL, mtime=0)),
        "zstd": len(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(payload)),
        "sparse": len(files["same"]),
        "sparse_fp16": len(files["fp16"]),
        "sparse_int8": len(files["int8"]),
    }
    before = len(payload) if original is None else len(_dense(original))
    facts: dict[str, Any] = {f"{name}_bytes": n for name, n in sizes.items()} | {"original_bytes": before}
    facts |= {f"ratio_{name}": round(before / n, 4) for name, n in sizes.items()}
    weights = [t.detach().cpu() for t in state.values() if t.is_floating_point() and t.ndim > 1]
    nonzero, total = sum(int(t.count_nonzero()) for t in weights), sum(t.numel() for t in weights)
    facts |= {"nonzero_share": round(nonzero / max(1, total), 6), "values": values}
    facts |= {f"error_{how}": _error(weights, how) for how in VALUES[1:]}
    return facts, files[values]


def _dense(state: Mapping[str, Tensor]) -> bytes:
    # copies, because safetensors refuses tensors that share memory
    return safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in state.items()})


def _error(weights: Sequence[Tensor], values: str) -> float:
    """The relative error of the weights, see `measure`."""
    lost = whole = 0.0
    for weight in weights:
        compact, scale = _compact(weight, values)
        whole += float(weight.double().square().sum())
        if scale is not None:
            lost += float((weight.double() - compact.double() * scale).square().sum())
    return float(f"{math.sqrt(lost / whole):.3g}") if whole else 0.0
