"""Stage `prune`: sparse copies of a run's encoder, each a run folder of its own, fine-tuned, probed and weighed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checkpoint, run_folder
from ..config import Config, digest, flatten_data
from ..distributed.collectives import gather_objects, propagate_errors
from ..distributed.launch import Runtime
from ..errors import ConfigError, RunFolderError, unknown_name
from ..evaluation.checks import check_probe, needs_encoder
from ..evaluation.encoder import check_classes, load_model
from ..evaluation.monitor import online_probe
from ..evaluation.probes.base import input_of
from ..models import PretrainingModel
from ..pruning import PRUNERS, WeightMasks, build_masks, emptied, masks_digest, measure, prunable
from ..training import assemble
from ..training.metrics import console
from .pretrain import Start, pretrain
from .probe import probe

PRUNED, SPARSE = "pruned", "model.sparse.safetensors"
DEFAULT_LR_SHARE = 0.1

Masks = dict[str, Tensor]


def check_prune(folder: Path, config: Config, *, resume: bool) -> None:
    """Raise ConfigError or RunFolderError for what can be known to be wrong before any data is read."""
    settings = config.prune
    if settings.method not in PRUNERS:
        raise ConfigError("prune.method: " + unknown_name("pruning method", settings.method, PRUNERS))
    if not needs_encoder(config):
        raise ConfigError(
            f"probe.kind={', '.join(config.probe.kinds)} reads pixels, which pruning does not change: choose "
            "probes of features, such as probe.kind=linear"
        )
    plans = [pruned_config(folder, config, rate) for rate in settings.rates]
    if len({plan.folder for plan in plans}) < len(plans):
        raise ConfigError(f"prune.rate names a rate twice: {', '.join(f'{rate:g}' for rate in settings.rates)}")
    for plan in plans:
        _check_folder(plan, resume=resume)


def pruned_config(folder: Path, config: Config, rate: float) -> Config:
    """The settings of the run folder of one rate: the run's own, with those of `prune.finetune` in their place."""
    settings, tune = config.prune, config.prune.finetune
    name = "-".join([settings.method, settings.scope, f"{rate:g}", *([settings.label] if settings.label else [])])
    kinds = tuple(k for k in config.probe.kinds if input_of(k, getattr(config.probe, k)) != "pixels")
    changes: dict[str, Any] = {
        "name": f"{config.name}-{name}",
        "run_dir": str(folder / PRUNED / name),
        "prune": settings.model_copy(update={"rate": rate}),
        "probe": config.probe.model_copy(update={"kind": kinds}),
    }
    if settings.finetunes:
        # whoever reads this config.yaml sees what was done, not what the dense run did
        changes["model"] = config.model.model_copy(update={"weights": None})
        changes["train"] = config.train.model_copy(
            # ddp: ZeRO keeps its own copies of the weights, in which the pruned ones would grow again
            update={"epochs": tune.epochs or config.train.epochs, "iterations": tune.iterations, "engine": "ddp"}
        )
        changes["optim"] = config.optim.model_copy(
            update={
                "lr": tune.lr if tune.lr is not None else DEFAULT_LR_SHARE * assemble.peak_lr(config),
                "lr_per_256": None,
                "schedule": tune.schedule,
                "warmup_epochs": tune.warmup_epochs,
                "warmup_iterations": 0,
                "final_lr_fraction": 0.0,
            }
        )
    return config.model_copy(update=changes)


def prune(
    folder: Path, config: Config, runtime: Runtime, data: assemble.Data, *, resume: bool = False
) -> list[dict[str, Any]]:
    """Prune, fine-tune, probe and weigh at every rate of `prune.rate`; the entries written into results.json.

    Every rate starts from the dense encoder of the run's best checkpoint and becomes a run folder below
    `folder`/pruned. Only weights of the encoder's convolutions and linear layers are pruned: the heads are not part
    of what is evaluated. With `resume`, prunings that were begun go on from their newest checkpoint. Collective.
    Raises ConfigError, DataError, RunFolderError, CheckpointCorrupt before work, NonFinite during it.
    """
    with propagate_errors():
        check_prune(folder, config, resume=resume)
        check_probe(config, data.splits)
    dense, found = load_model(folder)
    with propagate_errors():
        check_classes(folder, found, data.splits)
        scores = PRUNERS[config.prune.method](prunable(dense.encoder))
        chosen = {rate: build_masks(scores, rate, config.prune.scope) for rate in config.prune.rates}
    _agree(folder, chosen)
    results = []
    for rate, masks in chosen.items():
        plan = pruned_config(folder, config, rate)
        if runtime.is_main:
            _warn_of_emptied(rate, masks)
        _make(plan, dense, found, masks, runtime, data, resume=resume)
        probed = probe(plan.folder, plan, runtime, data)
        model, best = load_model(plan.folder)
        with propagate_errors():
            facts = _facts(plan, model, best, found, masks) if runtime.is_main else {}
        entries = [{**entry, **facts, "stage": "prune"} for entry in probed]
        with propagate_errors():
            if runtime.is_main:
                for entry in entries:
                    run_folder.add_result(plan.folder, entry)
                    run_folder.add_result(folder, entry)
        results += entries
    return results


def _check_folder(plan: Config, *, resume: bool) -> None:
    """Raise RunFolderError unless a pruning of these settings may be written."""
    folder = plan.folder
    if not run_folder.is_used(folder):
        return
    if not resume:
        raise RunFolderError(
            f"{folder}: pruned already; add --resume to go on, delete it, or keep both with prune.label=TEXT"
        )
    old, new = (flatten_data(c.prune.model_dump(mode="json")) for c in (run_folder.read_config(folder), plan))
    changed = [f"prune.{key}: {old[key]} -> {new[key]}" for key in new if old[key] != new[key]]
    if changed:
        raise RunFolderError(
            f"{folder}: was pruned with other settings ({'; '.join(changed)}); resume with the same ones, or choose "
            "another folder with prune.label=TEXT"
        )
    run_folder.check_usable(folder, plan, resume=True)


def _agree(folder: Path, chosen: dict[float, Masks]) -> None:
    """Raise RunFolderError unless all ranks hold the same masks: they would train different models. Collective."""
    digests = gather_objects([masks_digest(masks) for masks in chosen.values()])
    apart = [str(rank) for rank, own in enumerate(digests) if own != digests[0]]
    if apart:
        raise RunFolderError(f"{folder}: ranks {', '.join(apart)} see other weights than rank 0: nothing was pruned")


def _warn_of_emptied(rate: float, masks: Masks) -> None:
    """Not an error: past an empty layer the encoder may live on by its residual connections."""
    if names := emptied(masks):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        console.print(f"prune.rate={rate:g} leaves nothing of {shown}", soft_wrap=True, style="yellow", markup=False)


def _make(
    plan: Config,
    dense: PretrainingModel,
    found: checkpoint.Checkpoint,
    masks: Masks,
    runtime: Runtime,
    data: assemble.Data,
    *,
    resume: bool,
) -> None:
    """The run folder of one pruning, with its checkpoint: fine-tuned, or as it is, at step 0. Collective."""
    if plan.prune.finetunes:
        start = Start(dict(dense.state_dict()), found.tensors.get("objective", {}), masks)
        probing = online_probe(plan, runtime, data)
        pretrain(plan, runtime, data, resume=resume, online_probe=probing, start=start)
        return
    with propagate_errors():
        if runtime.is_main:
            model = copy.deepcopy(dense)
            held = WeightMasks(model.encoder, masks)
            run_folder.create(plan.folder, plan)
            checkpoint.save_checkpoint(
                plan.folder / run_folder.CHECKPOINTS,
                0,
                {"model": dict(model.state_dict()), "masks": held.packed()},
                {name: value for name, value in found.state.items() if name not in ("step", "stopping")},
                world_size=runtime.world_size,
                config_digest=digest(plan),
            )


def _facts(
    plan: Config, model: PretrainingModel, best: checkpoint.Checkpoint, dense: checkpoint.Checkpoint, masks: Masks
) -> dict[str, Any]:
    """What results.json says of one pruning beside the scores; writes the sparse file. `model` is of `best`."""
    weights = prunable(model.encoder)
    return {
        "folder": f"{PRUNED}/{plan.folder.name}",
        "prune": {
            "method": plan.prune.method,
            "rate": plan.prune.rates[0],
            "scope": plan.prune.scope,
            "zeros": sum(int((weight == 0).sum()) for weight in weights.values()),
            "weights": sum(weight.numel() for weight in weights.values()),
            "emptied": emptied(masks),
            "finetune_steps": best.state["step"],
            "dense_checkpoint": dense.path.name,
        },
        "size": measure(model.encoder.state_dict(), plan.folder / SPARSE),
    }
