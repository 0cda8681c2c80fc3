"""Reading checkpoints: everything is verified before it is used, and nothing outside the folder is opened."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointCorrupt, RunFolderError
from ..renamed import new_state
from .disk import from_json, hash_file, open_plain, read_file, unseal
from .layout import MANIFEST, STATE, TENSORS, path_of, step_of

FORMAT = 1
MANIFEST_LIMIT = 1 << 20
_FILE = re.compile(r"[A-Za-z0-9_]{1,64}\.(safetensors|json)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: tensors by file stem (`model`, `optimizer`, ...), and the plain `state`."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """step-N, also while its folder is renamed aside (see layout)."""
        return f"step-{self.manifest['step']}"


def list_steps(folder: Path) -> list[int]:
    """Steps of the published checkpoints, oldest first. Raises RunFolderError when the folder cannot be read."""
    try:
        found = {step_of(p.name) for p in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be read: {error.strerror}") from None
    return sorted(step for step in found if step is not None)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint folder. Raises CheckpointCorrupt naming the file that differs.

    Files that the manifest does not name are ignored.
    """
    manifest = read_manifest(path)
    payloads = {name: _read_verified(path / name, entry) for name, entry in manifest["files"].items()}
    state = _state(path / STATE, payloads.pop(STATE), manifest["step"])
    tensors = {}
    for name, payload in payloads.items():
        if name.endswith(TENSORS):
            tensors[name.removesuffix(TENSORS)] = _tensors(path / name, payload)
    return Checkpoint(path, tensors, state, manifest)


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a message for each newer one that did not.

    None when the folder has no checkpoints. Raises CheckpointCorrupt when it has some and none verifies: a run that
    was saved never starts again from step 0.
    """
    refused: dict[int, str] = {}
    # listed again each time: a run that is still training deletes old checkpoints while they are read here
    while left := [step for step in list_steps(folder) if step not in refused]:
        path = path_of(folder, left[-1])
        try:
            return load_checkpoint(path), list(refused.values())
        except CheckpointCorrupt as error:
            if path == path_of(folder, left[-1]) and left[-1] in list_steps(folder):
                refused[left[-1]] = str(error)
    if refused:
        raise CheckpointCorrupt(
            f"{next(iter(refused.values()))}; no older checkpoint is left to fall back on: restore the file, or "
            "start in a new folder"
        )
    return None, []


def problem_of(path: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, or None. Without `hashes` only the manifest and sizes are checked."""
    try:
        manifest = read_manifest(path)
        for name, entry in manifest["files"].items():
            _check_size(path / name, entry)
            if hashes and hash_file(path / name) != entry["sha256"]:
                raise CheckpointCorrupt(_changed(path / name))
        _state(path / STATE, read_file(path / STATE), manifest["step"])
    except CheckpointCorrupt as error:
        return str(error)
    return None


@contextmanager
def mismatch_is_corrupt(path: Path) -> Iterator[None]:
    """Turns errors inside, from using the verified checkpoint `path` for another model, into CheckpointCorrupt."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointCorrupt(f"{path}: verified, but does not fit this run's model: {reason}") from error


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, checked for its form and hash. Raises CheckpointCorrupt.

    `step` int >= 0 (that of the folder's name), `world_size` int >= 1, `config_digest` text,
    `files` name -> {"bytes": int >= 0, "sha256": 64 hex digits}.
    """
    where = path / MANIFEST
    payload = read_file(where, limit=MANIFEST_LIMIT)
    try:
        manifest = unseal(payload)
        _check_form(manifest)
    except ValueError as error:
        raise CheckpointCorrupt(f"{where}: {error}") from None
    expected = step_of(path.name)
    if expected is not None and manifest["step"] != expected:
        raise CheckpointCorrupt(f"{where}: is that of step {manifest['step']}")
    return manifest


def _check_form(manifest: dict[str, Any]) -> None:
    if manifest.get("format") != FORMAT:
        raise ValueError(f"format {manifest.get('format')!r:.40}, this program reads {FORMAT}")
    files = manifest.get("files")
    sound = (
        set(manifest) == {"format", "step", "world_size", "config_digest", "files"}
        and _is_count(manifest["step"], 0)
        and _is_count(manifest["world_size"], 1)
        and isinstance(manifest["config_digest"], str)
        and isinstance(files, dict)
        and STATE in files
        and all(_FILE.fullmatch(name) and name != MANIFEST for name in files)
        and all(_is_entry(entry) for entry in files.values())
    )
    if not sound:
        raise ValueError("not of the form of a manifest")


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and least <= value < 2**63


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == {"bytes", "sha256"}
        and _is_count(entry["bytes"], 0)
        and isinstance(entry["sha256"], str)
        and _SHA256.fullmatch(entry["sha256"]) is not None
    )


def _check_size(path: Path, entry: dict[str, Any]) -> None:
    handle, size = open_plain(path)
    os.close(handle)
    if size != entry["bytes"]:
        raise CheckpointCorrupt(f"{path}: {size} bytes, {entry['bytes']} were written")


def _changed(path: Path) -> str:
    return f"{path}: its bytes changed since it was written (sha256 differs)"


def _read_verified(path: Path, entry: dict[str, Any]) -> bytes:
    _check_size(path, entry)
    payload = read_file(path)
    if hashlib.sha256(payload).hexdigest() != entry["sha256"]:
        raise CheckpointCorrupt(_changed(path))
    return payload


def _state(path: Path, payload: bytes, step: int) -> dict[str, Any]:
    try:
        state = from_json(payload)
    except ValueError as error:
        raise CheckpointCorrupt(f"{path}: {error}") from None
    if type(state.get("step")) is not int or state["step"] != step:
        raise CheckpointCorrupt(f"{path}: `step` is {state.get('step')!r:.40}, the manifest says {step}")
    return new_state(state)


def _tensors(path: Path, payload: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(payload)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointCorrupt(f"{path}: not a safetensors file: {str(error)!r:.200}") from None
