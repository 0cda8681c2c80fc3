"""Resuming a run from its newest checkpoint, on the same or another number of ranks."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoint, run_folder
from ..config import Config
from ..distributed.collectives import gather_objects, propagate_errors
from ..distributed.launch import Runtime
from ..errors import ConfigError, WorldSizeMismatch
from ..seeding import changed_since
from ..terminal import note, warn
from .agreement import check_same_checkpoint, check_unchanged
from .data import Data
from .state import TrainState


def resume_newest(state: TrainState, folder: Path, runtime: Runtime, config: Config, data: Data) -> bool:
    """Load the newest checkpoint that verifies into `state`; False when the run has not saved one yet. Collective.

    Rank 0 chooses the checkpoint and the others load the same one: if each chose for itself, they could differ.
    Raises CheckpointCorrupt, ConfigError, DataChanged, RanksDiffer, RunFolderError, WorldSizeMismatch.
    """
    found: checkpoint.Checkpoint | None = None
    with propagate_errors():
        if runtime.is_main:
            found, refused = checkpoint.load_newest(folder / run_folder.CHECKPOINTS)
            for line in refused:
                warn(f"not used: {line}")
    path = gather_objects(found.path if found else None)[0]
    if path is None:
        if runtime.is_main:
            note(f"{folder}: no checkpoint yet, starting from step 0")
        return False
    with propagate_errors():
        found = found or checkpoint.load_checkpoint(path)
        saved_world = found.manifest["world_size"]
        if saved_world != runtime.world_size and not config.train.allow_world_size_change:
            raise WorldSizeMismatch(
                f"{path}: saved by {saved_world} ranks, resumed on {runtime.world_size}; start {saved_world} ranks, "
                "or set train.allow_world_size_change=true"
            )
        if "masks" in found.tensors and config.train.engine == "deepspeed":
            raise ConfigError(
                f"{path}: is pruned, and train.engine=deepspeed keeps copies of the weights that its masks do not "
                "reach: use train.engine=ddp"
            )
        with checkpoint.mismatch_is_corrupt(path):
            change = check_unchanged(config, found.state, data.fingerprint, path)
    check_same_checkpoint(found)
    with propagate_errors(), checkpoint.mismatch_is_corrupt(path):
        state.load(found.tensors, found.state)
    if runtime.is_main:
        changed = saved_world != runtime.world_size
        ranks = f" (saved by {saved_world} ranks, going on with {runtime.world_size})" if changed else ""
        note(f"{folder}: going on from step {state.step}{ranks}")
        if change is not None:
            warn(change)
        if (warning := changed_since(found.state)) is not None:
            warn(f"{path}: {warning}")
    return True
