"""Parts of a run's model for use on their own: encoder, encoder and projection, or encoder and a fitted probe."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint, run_folder
from ..data import EvalTransform
from ..errors import ConfigError, RunFolderError, unknown_name
from ..evaluation.encoder import load_model
from ..evaluation.fitted_probe import FOLDER, build_probe, load_probe
from ..evaluation.probes import PROBES, FittedProbe
from ..evaluation.probes.knn import NearestNeighbors
from ..models import Projection, build_encoder

PARTS = {"encoder": "features", "projection": "embeddings", "classifier": "logits"}
"""Part -> its output: features [N, D], embeddings of unit length [N, D], logits [N, classes]."""


@dataclass(frozen=True)
class ModelPart:
    """A part of a run's model, on the CPU, in eval mode."""

    module: nn.Module
    """Normalized images float32 [N, C, S, S] -> the output that PARTS names."""
    description: dict[str, Any]
    """Plain data from which `build_part` builds the module again: part, checkpoint (name of the folder it was loaded
    from), channels (1: gray, 3: RGB), image_size (px), normalization (mean and std per channel, in units of 0..1, and
    bits of the images where they are not 8),
    classes (names: those of the run or, for logits, of their columns), encoder, projection and probe (how to build
    them; null where there is none)."""

    @property
    def name(self) -> str:
        return self.description["part"]

    @property
    def output(self) -> str:
        return PARTS[self.name]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S) of one image."""
        size = self.description["image_size"]
        return self.description["channels"], size, size

    @property
    def bits(self) -> int:
        """Of each channel of an image, 8 or 16."""
        return int(self.description["normalization"].get("bits", 8))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.description["classes"])

    def with_normalization(self) -> nn.Sequential:
        """Images uint8 or uint16 (see `bits`) [N, C, S, S] -> the output, as evaluation computes it."""
        return nn.Sequential(EvalTransform(**self.description["normalization"]), self.module).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, C, S, S] on the CPU -> the output."""
        return self.with_normalization()(images)


def load_part(folder: Path, part: str, probe: str | None = None) -> ModelPart:
    """A part of a run's best checkpoint (see load_model).

    probe: for the classifier, which of RUN_DIR/probes; None: the only one there.

    Raises ConfigError for unknown names; RunFolderError if the run has no checkpoint, no projection or no probe
    fitted on that checkpoint; CheckpointCorrupt.
    """
    if part not in PARTS:
        raise ConfigError("--part: " + unknown_name("part", part, PARTS))
    if probe is not None and part != "classifier":
        raise ConfigError(f"--probe={probe} goes with --part classifier, not with {part}")
    run_folder.read_config(folder)
    return _load_classifier(folder, probe) if part == "classifier" else _load_pretrained(folder, part)


def build_part(description: dict[str, Any]) -> nn.Module:
    """The module of a `ModelPart.description`, in eval mode, its weights still to be loaded."""
    probe = None if description["probe"] is None else build_probe(description["probe"])
    if probe is not None and probe.input != "features":
        return as_classifier(None, probe).eval()
    encoder = build_encoder(**description["encoder"])
    if probe is not None:
        return as_classifier(encoder, probe).eval()
    if description["projection"] is None:
        return encoder.eval()
    return with_projection(encoder, Projection(cast(int, encoder.feature_dim), **description["projection"])).eval()


def _load_pretrained(folder: Path, part: str) -> ModelPart:
    model, found = load_model(folder)
    if part == "projection" and "projection" not in model.heads:
        heads = ", ".join(model.heads)
        raise RunFolderError(f"{folder}: this run's loss trained no projection (it has: {heads}); use --part encoder")
    has_projection = part == "projection"
    module = with_projection(model.encoder, model.heads["projection"]) if has_projection else model.encoder
    state = found.state
    return model_part(
        part,
        module,
        checkpoint=found.name,
        classes=state["classes"],
        normalization=state["normalization"],
        encoder=state["encoder"],
        projection=state["projection"] if has_projection else None,
    )


def _load_classifier(folder: Path, kind: str | None) -> ModelPart:
    kind = _choose_probe(folder, kind)
    fitted = load_probe(folder / FOLDER / kind)
    description = fitted.description
    encoder, encoder_description, image_shape = None, description["encoder"], None
    name = f"{FOLDER}/{kind}"
    if fitted.input == "features":
        model, found = load_model(folder)
        if found.state["step"] != description["step"]:
            raise RunFolderError(
                f"{folder}: its {kind} probe was fitted on step {description['step']}, but the best checkpoint is "
                f"step {found.state['step']}: run `hpc-supcon probe {folder} probe.kind={kind}` again"
            )
        if "@" not in kind and (unknown := sorted(set(description["classes"]) - set(found.state["classes"]))):
            raise RunFolderError(
                f"{folder}: its {kind} probe was fitted on classes that its encoder was not trained on: "
                f"{', '.join(unknown[:3])}{' ...' * (len(unknown) > 3)}; run `hpc-supcon probe {folder} "
                f"probe.kind={kind}` again"
            )
        encoder, encoder_description, name = model.encoder, found.state["encoder"], found.name
    elif fitted.input == "pixels":
        channels = len(description["normalization"]["mean"])
        image_shape = channels, isqrt(description["in_dim"] // channels)
    return model_part(
        "classifier",
        as_classifier(encoder, fitted),
        checkpoint=name,
        classes=description["classes"],
        normalization=description["normalization"],
        encoder=encoder_description,
        probe=description,
        image_shape=image_shape,
    )


def model_part(
    name: str,
    module: nn.Module,
    *,
    checkpoint: str,
    classes: list[str],
    normalization: dict[str, Any],
    encoder: dict[str, Any] | None,
    projection: dict[str, Any] | None = None,
    probe: dict[str, Any] | None = None,
    image_shape: tuple[int, int] | None = None,
) -> ModelPart:
    """image_shape: (channels, image_size) where there is no encoder, whose description has them."""
    if encoder is not None:
        image_shape = encoder["in_channels"], encoder["image_size"]
    assert image_shape is not None
    description = {
        "part": name,
        "checkpoint": checkpoint,
        "channels": image_shape[0],
        "image_size": image_shape[1],
        "normalization": normalization,
        "classes": list(classes),
        "encoder": encoder,
        "projection": projection,
        "probe": probe,
    }
    return ModelPart(module.eval().requires_grad_(False), description)


def with_projection(encoder: nn.Module, projection: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(encoder=encoder, projection=projection))


def as_classifier(encoder: nn.Module | None, probe: FittedProbe) -> nn.Sequential:
    """encoder: the run's, for a probe of features. The probe's own normalization is left out, because the images that
    a part reads are normalized."""
    if probe.input == "features":
        assert encoder is not None
        return nn.Sequential(OrderedDict(encoder=encoder, prepare=probe.prepare, head=probe.head))
    return nn.Sequential(OrderedDict(encoder=probe.encoder, prepare=probe.prepare[1:], head=probe.head))


def _choose_probe(folder: Path, wanted: str | None) -> str:
    saved = [kind for kind in PROBES if checkpoint.list_steps(folder / FOLDER / kind)]
    of_other_data = sorted(path.name for path in (folder / FOLDER).glob("*@*") if checkpoint.list_steps(path))
    if wanted is None and not saved:
        saved = of_other_data
    if wanted is None:
        if not saved:
            raise RunFolderError(f"{folder}: no fitted probe in it; run `hpc-supcon probe {folder}` first")
        if len(saved) > 1:
            raise ConfigError(f"{folder} has several fitted probes; choose one with --probe: {', '.join(saved)}")
        return saved[0]
    if wanted in of_other_data:
        return wanted
    if wanted not in PROBES:
        raise ConfigError("--probe: " + unknown_name("probe", wanted, PROBES))
    if wanted not in saved:
        raise RunFolderError(
            f"{folder}: no fitted {wanted} probe in it ({', '.join(saved) or 'none'} saved); run "
            f"`hpc-supcon probe {folder} probe.kind={wanted}` first"
        )
    return wanted


class PixelModel(nn.Module):
    """Images float32 [N, C, S, S] in 0..1 -> the part's output: the normalization is inside.

    No branch depends on the values of tensors, so that it can be traced.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, part: ModelPart) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(part.description["normalization"][name]).view(-1, 1, 1))
        module = part.module
        if part.name == "classifier":
            assert isinstance(module, nn.Sequential)
            module = nn.Sequential(*[TraceableNeighbors(m) if isinstance(m, NearestNeighbors) else m for m in module])
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module((images - self.mean) / self.std)


class TraceableNeighbors(nn.Module):
    """`NearestNeighbors` without tiles, and without its branch on equal similarities: among training rows exactly as
    similar as the k-th, any may vote. Computes [N, training rows] similarities at once."""

    bank: Tensor
    votes: Tensor

    def __init__(self, head: NearestNeighbors) -> None:
        super().__init__()
        self.k, self.temperature = head.k, head.temperature
        self.register_buffer("bank", head.bank)
        self.register_buffer("votes", F.one_hot(head.labels, head.classes).float())

    def forward(self, features: Tensor) -> Tensor:
        similarities, rows = (F.normalize(features, dim=1) @ self.bank.T).topk(self.k, dim=1)
        weights = ((similarities - similarities[:, :1]) / self.temperature).exp()
        votes = (weights[:, :, None] * self.votes[rows]).sum(dim=1)
        return votes.clamp(min=torch.finfo(torch.float32).tiny).log()
