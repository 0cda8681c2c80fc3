"""Checkpoints: complete or absent, verified on loading, nothing pickled.

A checkpoint is a folder `step-N` of safetensors and JSON files with a manifest (sha256 and size of each).
It is written beside its final place, flushed to disk and renamed: it exists when its manifest does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ..errors import CheckpointCorrupt, RunFolderError

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What was read back: tensors by file stem (`model`, `optimizer`, `rng`) and the plain `state`."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    manifest: dict[str, Any]


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    world_size: int,
    config_digest: str,
    keep: int = 2,
    protect: Collection[int] = (),
) -> Path:
    """Publish `folder/step-N` and then delete all but the newest `keep` and the steps in `protect`.

    Call on one rank only.

    Raises RunFolderError naming the path when the disk is full or read-only; earlier checkpoints stay.
    """
    final, partial = folder / f"step-{step}", folder / f".partial-step-{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        files = {}
        for stem, named in tensors.items():
            # safetensors takes contiguous tensors only; loading copies into the parameters' own layout
            payload = safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in named.items()})
            files[f"{stem}.safetensors"] = _write(partial / f"{stem}.safetensors", payload)
        files["state.json"] = _write(partial / "state.json", _json(state))
        manifest = {
            "format": 1,
            "step": step,
            "world_size": world_size,
            "config_digest": config_digest,
            "files": files,
        }
        _write(partial / MANIFEST, _json({**manifest, "sha256": _sha256(_json(manifest))}))
        _sync_folder(partial)
        if final.exists():  # the same step again, after a fall-back to an older checkpoint
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFolderError(
            f"{final}: checkpoint not written: {error.strerror or error}; earlier ones are kept"
        ) from None
    for old in set(list_steps(folder)[:-keep]).difference(protect):
        shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    return final


def list_steps(folder: Path) -> list[int]:
    """Steps of the published checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = (_STEP.fullmatch(p.name) for p in folder.iterdir())
    return sorted(int(m.group(1)) for m in found if m)


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint folder. Raises CheckpointCorrupt naming the file that differs."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        claimed = manifest.pop("sha256")
        if claimed != _sha256(_json(manifest)) or manifest["format"] != 1:
            raise ValueError
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointCorrupt(f"{path / MANIFEST}: missing or changed since it was written") from None
    payloads = {name: _read_verified(path / name, entry) for name, entry in files.items()}
    tensors = {
        name.removesuffix(".safetensors"): safetensors.torch.load(payload)
        for name, payload in payloads.items()
        if name.endswith(".safetensors")
    }
    return Checkpoint(path, tensors, json.loads(payloads["state.json"]), manifest)


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that did not.

    None when the folder holds no checkpoint at all. Raises CheckpointCorrupt when it holds some and none
    verifies: a used folder never starts from step 0.
    """
    refused: list[str] = []
    for step in reversed(list_steps(folder)):
        try:
            return load(folder / f"step-{step}"), refused
        except CheckpointCorrupt as error:
            refused.append(str(error))
    if refused:
        raise CheckpointCorrupt(
            f"{refused[0]}; no older checkpoint is left to fall back on: restore the file, or start in a new folder"
        )
    return None, []


def _read_verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise CheckpointCorrupt(f"{path}: {error.strerror}") from None
    if len(payload) != entry["bytes"]:
        raise CheckpointCorrupt(f"{path}: {len(payload)} bytes, {entry['bytes']} were written")
    if _sha256(payload) != entry["sha256"]:
        raise CheckpointCorrupt(f"{path}: its bytes changed since it was written (sha256 differs)")
    return payload


def _write(path: Path, payload: bytes) -> dict[str, Any]:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(payload), "sha256": _sha256(payload)}


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, indent=1, sort_keys=True).encode()


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
