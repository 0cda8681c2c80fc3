"""What must be the same: versions and data on all ranks, and the data of a run when it is resumed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..checkpoint import Checkpoint
from ..config import Config
from ..data import DataFingerprint, Splits, class_differences, fingerprint
from ..data.sources.file_sizes import IntArray, file_sizes
from ..data.sources.folder import FolderSource
from ..distributed.agreement import ranks_that_differ
from ..distributed.collectives import gather_objects, rank, world_size
from ..errors import DataChanged, RanksDiffer

STATE_KEY = "data"
"""Of the data's fingerprint in a checkpoint's state.json."""
HEADS_OF_CLASSES = ("classifier",)
"""Heads with an output for each class."""


def versions() -> dict[str, str]:
    """The versions that must be the same on all ranks: architectures, random numbers and pixels follow from them."""
    others = {name: version(name) for name in ("torchvision", "timm", "numpy", "pillow")}
    return {"hpc-supcon": __version__, "torch": torch.__version__, **others}


def agreed_fingerprint(splits: Splits) -> DataFingerprint:
    """The fingerprint of the data, the same on every rank. Collective.

    Raises RanksDiffer on all ranks where a rank has other data than rank 0: other classes, images, labels or files.
    """
    if world_size() == 1:
        return fingerprint(splits)
    shared = not ranks_that_differ(_folders(splits))
    own = fingerprint(splits, _sizes_together if shared else None)
    different = ranks_that_differ(own)
    if different:
        found = gather_objects(own)
        others = f" (so have ranks {', '.join(map(str, different[1:4]))}{' ...' * (len(different) > 4)})"
        raise RanksDiffer(
            f"rank {different[0]} has other data than rank 0: {'; '.join(found[different[0]].differences(found[0]))}"
            f"{others if len(different) > 1 else ''}; give all ranks the same data set (data.root may differ)"
        )
    return own


def _folders(splits: Splits) -> str | None:
    """A text that is the same for ranks that see the same folders on one disk; None without files.

    Inode and time of change tell copies apart. The number of the device does not: it differs between the nodes that
    mount a shared disk.
    """
    sources = [source for source in vars(splits).values() if isinstance(source, FolderSource)]
    if not sources:
        return None
    seen = hashlib.sha256(str([len(source) for source in sources]).encode())
    for folder in sorted({path.parent for source in sources for path in source.paths}):
        try:
            found = os.stat(folder)  # noqa: PTH116
        except OSError:
            return f"not readable on rank {rank()}"
        seen.update(f"{found.st_ino} {found.st_ctime_ns};".encode())
    return seen.hexdigest()


def _sizes_together(paths: Sequence[Path]) -> IntArray:
    """`file_sizes` of files that all ranks see: each rank asks for a part, so that a disk that many nodes share is
    asked once for each file. Collective."""
    parts, own = world_size(), rank()
    mine = file_sizes(paths[len(paths) * own // parts : len(paths) * (own + 1) // parts])
    return np.concatenate(gather_objects(mine))


def check_same_checkpoint(found: Checkpoint) -> None:
    """Raise RanksDiffer where a rank read another checkpoint than rank 0, from another disk. Collective."""
    if different := ranks_that_differ(found.manifest["files"]):
        raise RanksDiffer(
            f"{found.path}: rank {different[0]} read another checkpoint there than rank 0; the run folder must be "
            "on a disk that all ranks share"
        )


def saved_fingerprint(state: Mapping[str, Any]) -> DataFingerprint | None:
    """That of the data which the run that saved `state` was trained on; None in checkpoints of 0.1."""
    return None if STATE_KEY not in state else DataFingerprint.from_json(state[STATE_KEY])


def check_unchanged(config: Config, state: Mapping[str, Any], now: DataFingerprint, where: Path) -> str | None:
    """Compare the data of a run to be resumed with those that its checkpoint `where` was trained on.

    Returns one line for the user where there is something to tell, else None. Raises DataChanged where the data
    changed and `data.allow_change` is false, or the run cannot go on with them although it is true.
    """
    before = saved_fingerprint(state)
    if before is None:
        changed = class_differences(now.classes, state["classes"])
        note = f"{where}: saved by an earlier version without a record of its data; whether they changed is unknown"
    else:
        changed = now.differences(before)
        note = None
    if not changed:
        return note
    what = f"{where}: the data are not those that the run was trained on: {'; '.join(changed)}"
    if not config.data.allow_change:
        raise DataChanged(
            f"{what}; bring the data back, go on with data.allow_change=true, or start a new run in another run_dir"
        )
    if (obstacle := _obstacle(config, state, before, now)) is not None:
        raise DataChanged(
            f"{what}; data.allow_change=true cannot go on with them: {obstacle}; start a new run in another run_dir"
        )
    return f"{what}; going on with them (data.allow_change=true)"


def _obstacle(
    config: Config, state: Mapping[str, Any], before: DataFingerprint | None, now: DataFingerprint
) -> str | None:
    """Why a run cannot go on with other data; None where it can.

    Steps are numbered by epochs of one length, and the order within an epoch is a pure function of the number of
    images, for some samplers of their labels: an epoch that was begun can only be ended in the same order.
    """
    if list(now.classes) != list(state["classes"]) and set(HEADS_OF_CLASSES) & set(state["heads"]):
        return "its classifier has an output for each of the earlier classes"
    if before is None:
        return None
    old, new, batch = before.splits["train"], now.splits["train"], config.data.batch_size
    epoch, epoch_before = new.images // batch, old.images // batch
    if epoch != epoch_before:
        return f"an epoch had {epoch_before} steps and would have {epoch}, from which all later steps are numbered"
    done = state["step"] % epoch_before
    if done and old.images != new.images:
        return f"step {state['step']} is in the middle of an epoch, whose order is that of {old.images:,} images"
    if done and config.data.sampler != "random" and old.labels != new.labels:
        sampler = f"data.sampler={config.data.sampler}"
        return f"step {state['step']} is in the middle of an epoch, whose order is of the earlier labels ({sampler})"
    return None
