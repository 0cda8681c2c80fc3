"""The images of a run as points: in pixels, features and projections, before training, at checkpoints and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint, run_folder
from ..config import Config
from ..data import EvalTransform, Source, full_scale
from ..distributed.collectives import gather_objects, gather_rows, propagate_errors
from ..distributed.launch import Runtime
from ..errors import ConfigError, HubError, RunFolderError
from ..metric_file import METRICS, read_events
from ..models import PretrainingModel
from ..seeding import changed_since
from ..terminal import note
from ..training.build import initial_model
from ..training.data import Data
from ..training.engine import place
from .encoder import check_classes, load_model, report_changed_data
from .features import extract_indexed
from .neighbors import check_finite

MAX_SIDE = 32
"""Pixels: a larger image is averaged down to this side before it is a point."""


@dataclass(frozen=True)
class Version:
    """A sample of images as points of each space, for some weights. The same on every rank, on the CPU."""

    name: str
    """"initial" before training, step-N; "" of the best checkpoint, and where there are only pixels."""
    caption: str
    """Which weights, for a reader."""
    checkpoint: str
    """step-N; "" for weights that were not loaded from one."""
    spaces: Mapping[str, Tensor]
    """float [n, D] by space; pixels only with the last weights."""
    index: Tensor
    """int64 [n]: of the images in their split."""


@dataclass(frozen=True)
class TrainedModel:
    """A model on this rank's device, with what the images need before it reads them."""

    model: PretrainingModel
    found: checkpoint.Checkpoint
    transform: EvalTransform


class Spaces(nn.Module):
    """uint8 images [B, C, H, W] -> their points in several spaces side by side, float [B, sum of the widths]."""

    def __init__(self, names: Sequence[str], source: Source, trained: TrainedModel | None) -> None:
        """trained: None where `names` has only pixels."""
        super().__init__()
        self.side = min(source.image_size, MAX_SIDE)
        self.widths = {name: self._width(name, source, trained) for name in names}
        self.feature_dim = sum(self.widths.values())
        self.model = trained.model if trained else None
        self.transform = trained.transform if trained else None

    def _width(self, name: str, source: Source, trained: TrainedModel | None) -> int:
        if name == "pixels":
            return source.channels * self.side**2
        assert trained is not None
        if name == "encoder":
            return int(trained.model.encoder.feature_dim)  # type: ignore[arg-type]  # not declared in nn.Module
        return int(trained.found.state["projection"]["out_dim"])

    def forward(self, images: Tensor) -> Tensor:
        found: dict[str, Tensor] = {}
        if "pixels" in self.widths:
            found["pixels"] = F.adaptive_avg_pool2d(images.float() / full_scale(images.dtype), self.side).flatten(1)
        if self.model is not None and self.transform is not None:
            found["encoder"] = self.model.encoder(self.transform(images))
            if "projection" in self.widths:
                found["projection"] = self.model.heads["projection"](found["encoder"])
        return torch.cat([found[name].float() for name in self.widths], dim=1)


def reads_encoder(config: Config) -> bool:
    """Whether a map shows more than pixels. A run whose probes all read pixels has no encoder."""
    return config.probe.needs_encoder and any(space != "pixels" for space in config.report.spaces)


def check_has_checkpoint(folder: Path, config: Config) -> None:
    """Raise RunFolderError where the encoder that the maps show has not been saved yet. Only lists checkpoints."""
    if reads_encoder(config) and not checkpoint.list_steps(folder / run_folder.CHECKPOINTS):
        raise RunFolderError(
            f"{folder}: no checkpoint in it yet, so there are no embeddings: wait for the first one, or go on with "
            "the run by --resume; for maps of the pixels alone: report.spaces=[pixels]"
        )


def load_trained(folder: Path, config: Config, runtime: Runtime, data: Data) -> TrainedModel:
    """The run's best checkpoint. Collective. Raises ConfigError where it has none of the spaces asked for, and as
    load_model and check_classes."""
    model, found = load_model(folder)
    with propagate_errors():
        check_classes(folder, found, data.splits)
        if runtime.is_main:
            report_changed_data(folder, found, config, data.fingerprint)
        if not spaces_of(config, model) and "pixels" not in config.report.spaces:
            raise ConfigError(
                f"report.spaces={', '.join(config.report.spaces)}: {config.loss.label} trains no projection head; "
                "choose encoder"
            )
    transform = EvalTransform(**found.state["normalization"]).to(runtime.device)
    return TrainedModel(place(model, runtime, channels_last=config.train.channels_last), found, transform)


def spaces_of(config: Config, model: PretrainingModel) -> list[str]:
    """The spaces that the settings ask for and the model has, but for the pixels."""
    return [
        s for s in ("encoder", "projection") if s in config.report.spaces and (s == "encoder" or s in model.heads)
    ]


def read_versions(
    folder: Path,
    config: Config,
    runtime: Runtime,
    data: Data,
    source: Source,
    sample: Tensor,
    trained: TrainedModel | None,
) -> Iterator[Version]:
    """The images `sample` int64 [n] of `source` before training, at checkpoints, and, last, of the best one.

    Images that do not decode are left out. Collective. Raises NonFinite, CheckpointCorrupt.
    """
    images = source.subset(sample)

    def read(name: str, caption: str, step: str, spaces: Spaces) -> Version:
        own, _, index = extract_indexed(
            spaces, images, nn.Identity(), runtime, loader=data.loader, options=data.evaluation
        )
        check_finite(own, f"{folder}: what the encoder makes of the images {caption}")
        x, index = gather_rows(own).cpu(), gather_rows(index).cpu()
        parts = x.split(list(spaces.widths.values()), dim=1)
        return Version(name, caption, step, dict(zip(spaces.widths, parts, strict=True)), sample[index])

    if trained is None:
        yield read("", "", "", Spaces(["pixels"], source, None))
        return
    names, found = spaces_of(config, trained.model), trained.found

    def placed(model: PretrainingModel) -> Spaces:
        model = place(model, runtime, channels_last=config.train.channels_last)
        return Spaces(names, source, replace(trained, model=model))

    if names:
        model = _initial(folder, config, runtime, found)
        if model is not None:
            yield read("initial", "before training", "", placed(model))
        for step in _steps_between(folder, config.report.checkpoints, found.state["step"]):
            model, earlier = load_model(folder, step=step)
            yield read(earlier.name, f"at step {step:,}", earlier.name, placed(model))
    names = [*(["pixels"] if "pixels" in config.report.spaces else []), *names]
    yield read("", f"after training (step {found.state['step']:,})", found.name, Spaces(names, source, trained))


def _initial(folder: Path, config: Config, runtime: Runtime, found: checkpoint.Checkpoint) -> PretrainingModel | None:
    """The model that training started from, built again; None, with a line that says why, where that cannot be.
    Collective."""
    try:
        with propagate_errors():
            if "masks" in found.tensors:
                raise ConfigError("a pruned run starts from another run's weights")
            if reason := changed_since(found.state):
                raise ConfigError(reason)
            model, weights = initial_model(config, found.state)
            if weights is not None and runtime.is_main and _loaded(folder) not in (None, weights.sha256):
                raise ConfigError(f"model.weights={config.model.weights} is another file than at that time")
            return model
    except (ConfigError, HubError) as error:
        if runtime.is_main:
            note(f"embeddings: not drawn before training: {error}")
        return None


def _loaded(folder: Path) -> str | None:
    """The sha256 of the file of model.weights that training read; None where it is not known."""
    try:
        events = read_events(folder / METRICS)
    except OSError:
        return None
    return next((event.get("sha256") for event in events if event["event"] == "weights"), None)


def _steps_between(folder: Path, count: int, last: int) -> list[int]:
    """At most `count` steps of saved checkpoints before `last`, evenly spaced among them. Collective."""
    saved = gather_objects(checkpoint.list_steps(folder / run_folder.CHECKPOINTS))[0]
    steps = [step for step in saved if 0 < step < last]
    count = min(count, len(steps))
    return [steps[(2 * i + 1) * len(steps) // (2 * count)] for i in range(count)]
