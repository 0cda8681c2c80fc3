"""Loads the model of a run folder's best checkpoint, the same one on every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .. import checkpoint, run_folder
from ..checkpoint.layout import path_of
from ..config import Config, flatten
from ..data import DataFingerprint, EvalTransform, Splits, class_differences
from ..distributed.collectives import gather_objects, propagate_errors, rank
from ..errors import CheckpointCorrupt, DataError, RunFolderError
from ..models import PretrainingModel, build_model, merged
from ..terminal import warn
from ..training.agreement import check_same_checkpoint, saved_fingerprint

CHOOSE_IMAGES = (
    "seed",
    "data.source",
    "data.root",
    "data.beton",
    "data.image_size",
    "data.channels",
    "data.validation_fraction",
    "data.train_images",
)
SYNTHETIC = "data.synthetic."
"""The settings, and the section, that decide which images a run has."""


def check_has_encoder(folder: Path) -> None:
    """Raise RunFolderError for a run folder without checkpoints. Only lists them."""
    if not checkpoint.list_steps(folder / run_folder.CHECKPOINTS):
        raise RunFolderError(
            f"{folder}: no encoder in this run (it has no checkpoint): run `hpc-supcon pretrain`, or choose "
            "probes of pixels, such as probe.kind=softmax"
        )


def check_classes(folder: Path, found: checkpoint.Checkpoint, splits: Splits) -> None:
    """Raise DataError where a run's encoder was trained on other classes than the data have, or in another order."""
    if different := class_differences(splits.classes, found.state["classes"]):
        raise DataError(
            f"{folder}: the data have other classes than its encoder was trained on: {'; '.join(different)}; give "
            "the run's own data, name these in probe.transfer, or train an encoder on them"
        )


def report_changed_data(folder: Path, found: checkpoint.Checkpoint, config: Config, data: DataFingerprint) -> None:
    """Print a line where the run's own data have changed since the checkpoint: the encoder may have been trained on
    images that are now in test. Other data, that the settings ask for, are no change. On rank 0."""
    with checkpoint.mismatch_is_corrupt(found.path):
        before = saved_fingerprint(found.state)
    settings, own = flatten(config), flatten(run_folder.read_config(folder))
    is_own = all(settings[key] == own[key] for key in settings if key in CHOOSE_IMAGES or key.startswith(SYNTHETIC))
    if before is None or not is_own or not (changed := data.differences(before)):
        return
    warn(
        f"{folder}: its data have changed since it was trained: {'; '.join(changed)}; going on with them as "
        "they are now"
    )


def load_model(folder: Path, *, step: int | None = None) -> tuple[PretrainingModel, checkpoint.Checkpoint]:
    """The model of a run's best checkpoint, or of that of a step, on the CPU. Collective. Raises RunFolderError,
    CheckpointCorrupt, RanksDiffer.

    With early stopping, the best is the checkpoint at which it saw its best value; otherwise it is the newest that
    verifies. Rank 0 chooses and the other ranks load its choice: if each chose by itself, they could differ.
    """
    found: checkpoint.Checkpoint | None = None
    with propagate_errors():
        if rank() == 0:
            check_has_encoder(folder)
            frozen = (folder / run_folder.PARTS).exists()
            if frozen and (
                changed := run_folder.changed_parts(folder, run_folder.read_config(folder), ("encoders",))
            ):
                warn(f"{folder}: the code of its encoder is not that which it was trained with: {'; '.join(changed)}")
            checkpoints = folder / run_folder.CHECKPOINTS
            found = _choose(checkpoints) if step is None else checkpoint.load_checkpoint(path_of(checkpoints, step))
    path = gather_objects(found.path if found else None)[0]
    assert path is not None
    with propagate_errors():
        found = found or checkpoint.load_checkpoint(path)
        with checkpoint.mismatch_is_corrupt(found.path):
            model = build_model(found.state)
            model.load_state_dict(found.tensors.get("ema", found.tensors["model"]))
            state = merged(model, found.state)
            EvalTransform(**found.state["normalization"])  # used later: checked here, where an error names the file
            tuple(found.state["classes"])
    check_same_checkpoint(found)
    return model, replace(found, state=state)


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
