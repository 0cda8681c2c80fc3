"""Fitted probes on disk: RUN_DIR/probes/KIND, from which they predict without the data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..checkpoint.layout import path_of
from ..errors import CheckpointCorrupt
from ..models import build_encoder
from .probes import PROBES, FittedProbe

FOLDER = "probes"


def save_probe(probe: FittedProbe, folder: Path, step: int, *, world_size: int, config_digest: str) -> Path:
    """Write `folder/step-N` (N: the encoder's step), verified like a checkpoint, in place of any earlier one.

    On one rank only. Raises RunFolderError.
    """
    path = checkpoint.save_checkpoint(
        folder,
        step,
        {"probe": dict(probe.state_dict())},
        probe.description,
        world_size=world_size,
        config_digest=config_digest,
        keep=1,
        protect=[step],
    )
    for other in checkpoint.list_steps(folder):
        if other != step:  # fitted on a newer checkpoint that no longer verifies
            shutil.rmtree(path_of(folder, other))
    return path


def load_probe(folder: Path) -> FittedProbe:
    """The probe saved in RUN_DIR/probes/KIND, on the CPU, in eval mode. Raises CheckpointCorrupt."""
    found, _ = checkpoint.load_newest(folder)
    if found is None:
        raise CheckpointCorrupt(f"{folder}: no fitted probe in it; run `hpc-supcon probe` first")
    probe = build_probe(found.state)
    probe.load_state_dict(found.tensors["probe"])
    return probe.eval()


def build_probe(description: dict[str, Any]) -> FittedProbe:
    """The probe that a `FittedProbe.description` describes, its weights still to be loaded."""
    encoder = build_encoder(**description["encoder"]) if description["encoder"] is not None else None
    build_head, options = PROBES[description["kind"]].head, description["head"]["options"]
    head = build_head(description["in_dim"], len(description["classes"]), **options)
    return FittedProbe(description, head=head, encoder=encoder)
