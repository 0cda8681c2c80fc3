"""A fitted probe: raw input to logits, and its way to and from RUN_DIR/probes/KIND, without the data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..errors import CheckpointCorrupt
from ..models import Logistic, Mlp, build_encoder
from .features import build_prepare, in_chunks
from .knn import Neighbors

FOLDER = "probes"

HEADS: dict[str, Callable[..., nn.Module]] = {
    "linear": nn.Linear,
    "logistic": lambda in_dim, classes: Logistic(in_dim),
    "mlp": lambda in_dim, classes, **options: Mlp(in_dim, classes=classes, **options),
    "knn": Neighbors,
}
"""`description["head"]["name"]` -> factory(in_dim, classes, ...)."""


class FittedProbe(nn.Module):
    """Raw input -> [preparation, encoder where it has its own, head] -> logits.

    `description` is what builds it again: kind, input ("features": float [n, D] of the run's encoder; "pixels"
    and "images": uint8 [n, C, H, W]), classes, normalization, standardize, in_dim, head; for finetune the encoder.
    """

    def __init__(self, description: dict[str, Any], *, head: nn.Module, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.description = description
        self.prepare = build_prepare(
            description["input"],
            description["in_dim"],
            description["normalization"],
            standardize=description["standardize"],
        )
        self.encoder = encoder if encoder is not None else nn.Identity()
        self.head = head

    @property
    def kind(self) -> str:
        return self.description["kind"]

    @property
    def input(self) -> str:
        return self.description["input"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(self.description["classes"])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.prepare(x)))

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """float [n, classes] of raw input (see the class); softmax of them are probabilities (kNN: shares of the
        votes). Puts the module into eval mode."""
        self.eval()
        return in_chunks(self, x)

    @property
    def parameters_of_head(self) -> int:
        return sum(p.numel() for p in self.head.parameters())


def save_probe(probe: FittedProbe, folder: Path, step: int, *, world_size: int, config_digest: str) -> Path:
    """Write `folder/step-N` (N: the encoder's step), verified as checkpoints are, in place of any earlier one.

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
        if other != step:  # of a newer checkpoint that no longer verifies
            shutil.rmtree(folder / f"step-{other}")
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
    """The probe of a `FittedProbe.description`, not fitted yet."""
    encoder = build_encoder(**description["encoder"]) if description["encoder"] is not None else None
    head = description["head"]
    module = HEADS[head["name"]](description["in_dim"], len(description["classes"]), **head["options"])
    return FittedProbe(description, head=module, encoder=encoder)
