"""Writing checkpoints, and deleting old ones.

A checkpoint is a folder `step-N` of safetensors and JSON files with a manifest (sha256 and size of each file). It is
written under another name, flushed to disk and renamed: a checkpoint that exists is complete.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import sync_folder
from .disk import Content, check_space, json_content, not_written, seal, tensor_content, write_file
from .layout import DELETED, MANIFEST, PARTIAL, REPLACED, STATE, TENSORS, path_of, step_of
from .load import FORMAT, list_steps, problem_of

OVERHEAD = 64 << 10
"""Bytes a save needs in addition to its files' contents: manifest, folder, and the last block of each file."""


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    world_size: int,
    config_digest: str,
    keep: int = 2,
    keep_every: int | None = None,
    protect: Collection[int] = (),
    trusted: set[int] | None = None,
) -> Path:
    """Write `folder/step-N`, then delete old checkpoints (see `retain`). state.json has `step` as well as `state`.

    Call on one rank only. trusted: the steps that this process has written or verified, which is updated; the
    checkpoints of other steps are read once before they count as kept.

    Raises RunFolderError, with the path, the bytes needed and the bytes free, when the disk is full, read-only or
    broken; earlier checkpoints are kept.
    """
    final, partial = folder / f"step-{step}", folder / f"{PARTIAL}step-{step}"
    files = {f"{stem}{TENSORS}": tensor_content(named) for stem, named in tensors.items()}
    files[STATE] = json_content({**state, "step": step})
    about = {"format": FORMAT, "step": step, "world_size": world_size, "config_digest": config_digest}
    needed = sum(content.size for content in files.values()) + OVERHEAD
    trusted = set() if trusted is None else trusted
    try:
        _prepare(folder)
        check_space(folder, needed)
        _write(partial, files, about)
        trusted.discard(step)
        _publish(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise not_written(final, error, needed) from None
    trusted.add(step)
    retain(folder, keep, keep_every=keep_every, protect=protect, trusted=trusted)
    return final


def retain(folder: Path, keep: int, *, keep_every: int | None, protect: Collection[int], trusted: set[int]) -> None:
    """Delete checkpoints older than the newest `keep` complete ones.

    Only complete ones count, so that a damaged one never replaces the last one that loads. Complete means: manifest
    and sizes are right, and this process wrote it or has verified it. The steps in `protect` and the multiples of
    `keep_every` are kept. Damaged ones are deleted when they are as old as the others that are deleted. What cannot
    be deleted now is tried again after the next save.
    """
    complete = 0
    for step in reversed(list_steps(folder)):
        path = path_of(folder, step)
        if complete < keep:
            if problem_of(path, hashes=step not in trusted) is None:
                trusted.add(step)
                complete += 1
        elif step not in protect and not (keep_every and step % keep_every == 0):
            with contextlib.suppress(OSError):
                _delete(path)


def _prepare(folder: Path) -> None:
    """Make the folder; finish or undo a save that was killed. Raises OSError."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync_folder(folder.parent)
    for left in sorted(folder.iterdir()):
        if left.name.startswith(REPLACED) and (step := step_of(left.name)) is not None:
            if path_of(folder, step) == left:
                left.rename(folder / f"step-{step}")
            else:
                shutil.rmtree(left, ignore_errors=True)
        elif left.name.startswith((PARTIAL, DELETED)):
            shutil.rmtree(left, ignore_errors=True)


def _write(partial: Path, files: Mapping[str, Content], about: Mapping[str, Any]) -> None:
    """Write and flush all files of a checkpoint, the manifest last. Raises OSError."""
    partial.mkdir()
    written = {name: write_file(partial / name, content) for name, content in files.items()}
    write_file(partial / MANIFEST, json_content(seal({**about, "files": written})))
    sync_folder(partial)


def _publish(partial: Path, final: Path) -> None:
    """Give a written checkpoint its final name. Raises OSError.

    A checkpoint of the same step, which exists when a run was resumed from an older one, is renamed first. It remains
    the checkpoint of this step until the new one has its name, so that at every moment one of the two exists.
    """
    replaced = final.with_name(f"{REPLACED}{final.name}")
    replaces = final.exists()
    if replaces:
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
    if replaces:
        shutil.rmtree(replaced, ignore_errors=True)


def _delete(path: Path) -> None:
    """Rename, then delete, so that a kill cannot leave a checkpoint with half of its files. Raises OSError."""
    gone = path.with_name(f"{DELETED}step-{step_of(path.name)}")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
