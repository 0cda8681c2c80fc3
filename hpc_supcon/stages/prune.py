"""Stage `prune`: pruned copies of a run's encoder, each in its own run folder, fine-tuned, probed and measured."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checkpoint, run_folder
from ..config import Config, check_config, digest, flatten_data
from ..distributed.collectives import gather_objects, propagate_errors
from ..distributed.folder_lock import locked
from ..distributed.launch import Runtime
from ..errors import RunFolderError
from ..evaluation.encoder import check_classes, load_model, report_changed_data
from ..evaluation.monitor import online_probe
from ..evaluation.probes import check_probes
from ..models import PretrainingModel
from ..pruning import PRUNERS, WeightMasks, build_masks, fully_pruned, masks_digest, measure, prunable, write_sparse
from ..terminal import warn
from ..training.build import Start
from ..training.data import Data
from ..training.plan import peak_lr
from .pretrain import pretrain
from .probe import probe
from .results import ResultWriter

PRUNED, SPARSE = "pruned", "model.sparse.safetensors"
DEFAULT_LR_FACTOR = 0.1
"""Learning rate of fine-tuning relative to that of pre-training, where prune.finetune.lr is null."""

Masks = dict[str, Tensor]


def check_prune(folder: Path, config: Config, *, resume: bool) -> None:
    """Raise ConfigError or RunFolderError for mistakes that can be found before any data is read."""
    for rate in config.prune.rates:
        pruned = pruned_config(folder, config, rate)
        if pruned.prune.finetunes:
            check_config(pruned, stages=("pretrain",))
        _check_folder(pruned, resume=resume)


def pruned_config(folder: Path, config: Config, rate: float) -> Config:
    """The settings of one rate's run folder: the run's own, with those of `prune.finetune` for the training."""
    settings, tune = config.prune, config.prune.finetune
    name = "-".join([settings.method, settings.scope, f"{rate:g}", *([settings.label] if settings.label else [])])
    kinds = tuple(kind for kind in config.probe.kinds if config.probe.input_of(kind) != "pixels")
    changes: dict[str, Any] = {
        "name": f"{config.name}-{name}",
        "run_dir": str(folder / PRUNED / name),
        "prune": settings.model_copy(update={"rate": rate}),
        "probe": config.probe.model_copy(update={"kind": kinds}),
    }
    if settings.finetunes:
        # the folder's config.yaml says how it was fine-tuned, not how the dense run was trained
        changes["model"] = config.model.model_copy(update={"weights": None})
        changes["train"] = config.train.model_copy(
            update={
                "epochs": tune.epochs or config.train.epochs,
                "iterations": tune.iterations,
                # ddp: ZeRO keeps its own copies of the weights, which masks do not reach
                "engine": "ddp",
                "deepspeed": config.train.deepspeed.model_copy(update={"config": None}),
            }
        )
        changes["optim"] = config.optim.model_copy(
            update={
                "lr": tune.lr if tune.lr is not None else DEFAULT_LR_FACTOR * peak_lr(config),
                "lr_per_256": None,
                "schedule": tune.schedule,
                "warmup_epochs": tune.warmup_epochs,
                "warmup_iterations": 0,
                "final_lr_fraction": 0.0,
            }
        )
    return config.model_copy(update=changes)


def prune(
    folder: Path,
    config: Config,
    runtime: Runtime,
    data: Data,
    *,
    resume: bool = False,
    writer: ResultWriter | None = None,
) -> list[dict[str, Any]]:
    """Prune at every rate of `prune.rate`, fine-tune, probe, and measure the size on disk. Collective.

    Returns the entries written into results.json. Every rate starts from the dense encoder of the run's best
    checkpoint and gets a run folder of its own in `folder`/pruned. Only weights of the encoder's convolutions and
    linear layers are pruned: heads are not part of what is evaluated. With `resume`, unfinished prunings continue
    from their newest checkpoint. writer: of a caller that calls its `check`. Raises ConfigError, DataError,
    RunFolderError, CheckpointCorrupt before any work, NonFinite during it, ResultsNotWritten after it.
    """
    own = writer or ResultWriter()
    with locked(folder, runtime, warn):
        results = _prune(folder, config, runtime, data, own, resume)
    if writer is None:
        own.check()
    return results


def _prune(
    folder: Path, config: Config, runtime: Runtime, data: Data, writer: ResultWriter, resume: bool
) -> list[dict[str, Any]]:
    with propagate_errors():
        check_prune(folder, config, resume=resume)
        check_probes(config, data.splits)
        run_folder.check_results(folder)
    dense, found = load_model(folder)
    with propagate_errors():
        check_classes(folder, found, data.splits)
        if runtime.is_main and config.prune.finetunes:  # otherwise the probes say it
            report_changed_data(folder, found, config, data.fingerprint)
        scores = PRUNERS[config.prune.method](prunable(dense.encoder))
        masks_by_rate = {rate: build_masks(scores, rate, config.prune.scope) for rate in config.prune.rates}
    _check_same_masks(folder, masks_by_rate)
    results = []
    for rate, masks in masks_by_rate.items():
        pruned = pruned_config(folder, config, rate)
        if runtime.is_main:
            _warn_of_fully_pruned(rate, masks)
        with locked(pruned.folder, runtime, warn):
            _build_run_folder(pruned, dense, found, masks, runtime, data, resume=resume)
            probed = probe(pruned.folder, pruned, runtime, data, writer=writer)
            model, best = load_model(pruned.folder)
            facts = _facts(pruned, model, best, found, masks, writer) if runtime.is_main else {}
            entries = [{**entry, **facts, "stage": "prune"} for entry in probed]
            if runtime.is_main:
                for entry in entries:
                    writer.add(pruned.folder, entry)
                    writer.add(folder, entry)
        results += entries
    return results


def _check_folder(pruned: Config, *, resume: bool) -> None:
    """Raise RunFolderError unless a pruning with these settings may be written to its folder."""
    folder = pruned.folder
    if not run_folder.is_used(folder):
        return
    if not resume:
        raise RunFolderError(
            f"{folder}: pruned already; add --resume to continue, delete it, or keep both with prune.label=TEXT"
        )
    old, new = (flatten_data(c.prune.model_dump(mode="json")) for c in (run_folder.read_config(folder), pruned))
    changed = [f"prune.{key}: {old[key]} -> {new[key]}" for key in new if old[key] != new[key]]
    if changed:
        raise RunFolderError(
            f"{folder}: was pruned with other settings ({'; '.join(changed)}); resume with the same ones, or choose "
            "another folder with prune.label=TEXT"
        )
    run_folder.check_usable(folder, pruned, resume=True)


def _check_same_masks(folder: Path, masks_by_rate: dict[float, Masks]) -> None:
    """Raise RunFolderError unless all ranks have the same masks: they would train different models. Collective."""
    digests = gather_objects([masks_digest(masks) for masks in masks_by_rate.values()])
    different = [str(rank) for rank, own in enumerate(digests) if own != digests[0]]
    if different:
        raise RunFolderError(
            f"{folder}: ranks {', '.join(different)} read other weights than rank 0: nothing was pruned"
        )


def _warn_of_fully_pruned(rate: float, masks: Masks) -> None:
    """A warning, not an error: residual connections may carry the features past a layer without weights."""
    if names := fully_pruned(masks):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warn(f"prune.rate={rate:g} leaves nothing of {shown}")


def _build_run_folder(
    pruned: Config,
    dense: PretrainingModel,
    found: checkpoint.Checkpoint,
    masks: Masks,
    runtime: Runtime,
    data: Data,
    *,
    resume: bool,
) -> None:
    """The run folder of one pruning, with a checkpoint: fine-tuned, or at step 0 without fine-tuning. Collective."""
    if pruned.prune.finetunes:
        start = Start(copy.deepcopy(dense), found.tensors.get("objective", {}), masks)
        pretrain(pruned, runtime, data, resume=resume, online_probe=online_probe(pruned, runtime, data), start=start)
        return
    with propagate_errors():
        if runtime.is_main:
            model = copy.deepcopy(dense)
            packed = WeightMasks(model.encoder, masks).packed()
            run_folder.create(pruned.folder, pruned)
            checkpoint.save_checkpoint(
                pruned.folder / run_folder.CHECKPOINTS,
                0,
                {"model": dict(model.state_dict()), "masks": packed},
                {name: value for name, value in found.state.items() if name not in ("step", "stopping")},
                world_size=runtime.world_size,
                config_digest=digest(pruned),
            )


def _facts(
    pruned: Config,
    model: PretrainingModel,
    best: checkpoint.Checkpoint,
    dense: checkpoint.Checkpoint,
    masks: Masks,
    writer: ResultWriter,
) -> dict[str, Any]:
    """What results.json says about one pruning besides the scores. `model` is of `best`; writes its sparse file."""
    weights = prunable(model.encoder)
    sizes, sparse = measure(model.encoder.state_dict())
    with writer.may_fail():
        write_sparse(pruned.folder / SPARSE, sparse)
    return {
        "folder": f"{PRUNED}/{pruned.folder.name}",
        "prune": {
            "method": pruned.prune.method,
            "rate": pruned.prune.rates[0],
            "scope": pruned.prune.scope,
            "zeros": sum(int((weight == 0).sum()) for weight in weights.values()),
            "weights": sum(weight.numel() for weight in weights.values()),
            "emptied": fully_pruned(masks),
            "finetune_steps": best.state["step"],
            "dense_checkpoint": dense.name,
        },
        "size": sizes,
    }
