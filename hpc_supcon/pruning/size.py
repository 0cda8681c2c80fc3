"""What a state dict takes on disk: dense, compressed, and without its zeros."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from .sparse import save_sparse

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
