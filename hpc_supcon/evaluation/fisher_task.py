"""What second-order pruning methods ask about a run's encoder: a likelihood, its batches, and where Q is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from .. import checkpoint
from ..config import Config, digest
from ..distributed.collectives import gather_objects, propagate_errors
from ..distributed.launch import Runtime
from ..errors import CheckpointCorrupt
from ..losses import loss_spec
from ..pruning import Categorical, FisherSettings, FisherTask, InverseFisher, contrastive_outputs, contrastive_targets
from ..seeding import stream
from ..terminal import note, warn
from ..training.data import Data
from ..training.state import Training

Batches = Callable[[int], tuple[Tensor, Tensor]]


def fisher_task(
    folder: Path,
    config: Config,
    runtime: Runtime,
    data: Data,
    training: Training,
    batches: Batches,
    found: checkpoint.Checkpoint,
    learned: InverseFisher | None,
) -> FisherTask:
    """The task of the likelihood of `training`'s loss: softmax over the classifier's logits, or over similarities.

    config: of `training`, with one loss that check_config has allowed. folder: keeps what is learned, for the same
    checkpoint, settings, data and number of ranks. learned: of the round of pruning before.
    """
    (name,) = config.loss.weights
    spec, model, objective = loss_spec(name), training.state.model, training.state.objective
    uses_labels = spec.head == "classifier" or (objective.supervised and spec.uses_labels)
    temperature = float(torch.as_tensor(getattr(objective.losses[name], "temperature", 1.0)).detach())

    def outputs(parameters: Mapping[str, Tensor], views: Tensor) -> Tensor:
        """views [n, C, H, W] -> z [n, k]"""
        named = {f"encoder.{key}": p for key, p in parameters.items()}
        z: Tensor = functional_call(model, named, (views[:, None],))[spec.head].flatten(0, 1)
        return contrastive_outputs(z, temperature) if spec.contrastive else z

    def rows(index: int) -> tuple[Tensor, Tensor]:
        views, labels = batches(index)
        image = torch.arange(len(labels), device=labels.device)
        groups = labels if uses_labels else image
        if spec.contrastive:  # the views of an image without a label are positives of each other alone
            groups = torch.where(groups < 0, -1 - image, groups)
        groups = groups.repeat_interleave(views.shape[1])
        if spec.contrastive:
            seed = stream(config.seed, "inverse Fisher", 5, index, runtime.rank)
            groups = contrastive_targets(groups, torch.Generator().manual_seed(seed))
        return views.flatten(0, 1), groups

    path = folder / f"fisher-{_digest(config, runtime, data, found, learned)[:12]}"
    return FisherTask(
        model.encoder,
        outputs,
        Categorical(),
        _InOrder(rows),
        independent=not spec.contrastive,
        settings=FisherSettings(**config.prune.fisher.model_dump()),
        learned=learned,
        kept=KeptFisher(path, runtime),
        tell=note if runtime.is_main else lambda line: None,
    )


class _InOrder:
    """Batches read in order, where a step asks for two of them the other way round; the last two are held."""

    def __init__(self, read: Batches) -> None:
        self._read = read
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._held:
            first = index - 1 if index and index - 1 not in self._held else index
            self._held = {i: batch for i, batch in self._held.items() if i == index - 1}
            for i in range(first, index + 1):
                self._held[i] = self._read(i)
        return self._held[index]


class KeptFisher:
    """Kept as checkpoints `step-N` in a folder of its own. What does not verify is estimated again."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self._folder, self._runtime = folder, runtime
        self._trusted: set[int] = set()

    def load(self) -> dict[str, Tensor] | None:
        """What was saved last; None unless all ranks can read the same. Collective."""
        kept: checkpoint.Checkpoint | None = None
        problem = ""
        try:
            kept, refused = checkpoint.load_newest(self._folder)
            problem = refused[0] if refused else ""
        except CheckpointCorrupt as error:
            problem = str(error)
        if problem and self._runtime.is_main:
            warn(f"{problem}: estimated again")
        seen = gather_objects(None if kept is None else kept.manifest)
        if kept is None or any(manifest != seen[0] for manifest in seen):
            return None
        return kept.tensors["fisher"]

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """Collective: what cannot be written is an error on all ranks."""
        with propagate_errors():
            if self._runtime.is_main:
                tensors = {name: t.cpu() for name, t in state.items()}
                checkpoint.save_checkpoint(
                    self._folder, step, {"fisher": tensors}, {}, world_size=self._runtime.world_size,
                    config_digest="", keep=1, trusted=self._trusted,
                )  # fmt: skip


def _digest(
    config: Config, runtime: Runtime, data: Data, found: checkpoint.Checkpoint, learned: InverseFisher | None
) -> str:
    """Of everything that decides what is learned, that of the rounds before included."""
    facts: list[Any] = [
        found.manifest["files"],
        digest(config),
        data.fingerprint.as_json(),
        config.prune.method,
        config.prune.fisher.model_dump(mode="json"),
        config.prune.loss,
        runtime.world_size,
        runtime.device.type,
    ]
    if config.prune.loss == "cross_entropy":
        facts.append(config.probe.linear.model_dump(mode="json"))
    whole = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    if learned is not None:
        for name, t in learned.state_dict().items():
            whole.update(name.encode() + t.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()
