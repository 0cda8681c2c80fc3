"""Loads the model of a run folder's best checkpoint, the same one on every rank."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoint, run_folder
from ..checkpoint.layout import path_of
from ..data import EvalTransform, Splits
from ..distributed.collectives import gather_objects, propagate_errors, rank
from ..errors import CheckpointCorrupt, DataError, RunFolderError
from ..models import PretrainingModel, build_model
from ..terminal import warn


def check_has_encoder(folder: Path) -> None:
    """Raise RunFolderError for a run folder without checkpoints. Only lists them."""
    if not checkpoint.list_steps(folder / run_folder.CHECKPOINTS):
        raise RunFolderError(
            f"{folder}: no encoder in this run (it has no checkpoint): run `hpc-supcon pretrain`, or choose "
            "probes of pixels, such as probe.kind=softmax"
        )


def check_classes(folder: Path, found: checkpoint.Checkpoint, splits: Splits) -> None:
    """Raise DataError where a run's encoder was trained on other classes than the data have."""
    if tuple(found.state["classes"]) != splits.classes:
        raise DataError(f"{folder}: trained on classes {found.state['classes']}, the data has {list(splits.classes)}")


def load_model(folder: Path) -> tuple[PretrainingModel, checkpoint.Checkpoint]:
    """The model of a run's best checkpoint, on the CPU. Collective. Raises RunFolderError, CheckpointCorrupt.

    With early stopping, the best is the checkpoint at which it saw its best value; otherwise it is the newest that
    verifies. Rank 0 chooses and the other ranks load its choice: if each chose by itself, they could differ.
    """
    found: checkpoint.Checkpoint | None = None
    with propagate_errors():
        if rank() == 0:
            check_has_encoder(folder)
            found = _choose(folder / run_folder.CHECKPOINTS)
    path = gather_objects(found.path if found else None)[0]
    assert path is not None
    with propagate_errors():
        found = found or checkpoint.load_checkpoint(path)
        with checkpoint.mismatch_is_corrupt(found.path):
            model = build_model(found.state)
            model.load_state_dict(found.tensors.get("ema", found.tensors["model"]))
            EvalTransform(**found.state["normalization"])  # used later: checked here, where an error names the file
            tuple(found.state["classes"])
    return model, found


def _choose(checkpoints: Path) -> checkpoint.Checkpoint:
    newest, refused = checkpoint.load_newest(checkpoints)
    assert newest is not None
    for line in refused:
        warn(f"not used: {line}")
    with checkpoint.mismatch_is_corrupt(newest.path):
        best_at = newest.state["stopping"]["best_at"] if "stopping" in newest.state else None
        if best_at is None or int(best_at) == newest.state["step"]:
            return newest
    try:
        return checkpoint.load_checkpoint(path_of(checkpoints, int(best_at)))
    except CheckpointCorrupt as error:
        warn(f"not used: {error}; taking {newest.name} in place of the best, step {best_at}")
        return newest
