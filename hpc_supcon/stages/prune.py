"""Stage `prune`: pruned copies of a run's encoder, each in its own run folder, fine-tuned, probed and measured."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from .. import checkpoint, run_folder
from ..config import Config, check_config, digest
from ..distributed.collectives import propagate_errors
from ..distributed.folder_lock import locked
from ..distributed.launch import Runtime
from ..evaluation.encoder import check_classes, load_model, report_changed_data
from ..evaluation.monitor import online_probe
from ..evaluation.probes import PROBES, check_probes
from ..evaluation.prune_figures import draw_pruning
from ..evaluation.prune_task import check_data
from ..pruning import InverseFisher, WeightMasks, measure, misfits, prunable, write_sparse
from ..terminal import only_told, warn
from ..training.data import Data
from .pretrain import pretrain
from .probe import probe
from .pruned_channels import narrowed, select_channels, settle, with_widths
from .pruned_cost import cost_of
from .pruned_run import (
    PRUNED,
    check_folder,
    check_rewind,
    gradual_pruning,
    pruned_config,
    rewound,
    set_weights,
    starting_point,
    training_length,
)
from .pruned_weights import Selection, Trained, select, warn_of_masks
from .results import ResultWriter, writing

SPARSE = "model.sparse.safetensors"


def check_prune(folder: Path, config: Config, *, resume: bool) -> None:
    """Raise ConfigError or RunFolderError for mistakes that can be found before any data is read."""
    check_rewind(folder, config)
    for rate in config.prune.rounds:
        pruned = pruned_config(folder, config, rate)
        if pruned.prune.finetunes:
            check_config(pruned, stages=("pretrain",))
        check_folder(pruned, resume=resume)


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

    Returns the entries written into results.json. Every rate gets a run folder of its own in `folder`/pruned, and
    starts from the encoder of the run's best checkpoint; of the schedule `iterative`, from that of the rate before.
    Only weights of the encoder's convolutions and linear layers are pruned: heads are not part of what is evaluated.
    With `resume`, unfinished prunings continue from their newest checkpoint. writer: of a caller that calls its
    `check`. Raises ConfigError, DataError, RunFolderError, CheckpointCorrupt before any work, NonFinite during it,
    ResultsNotWritten after it.
    """
    with writing(folder, runtime, writer) as own:
        return _prune(folder, config, runtime, data, own, resume)


def _prune(
    folder: Path, config: Config, runtime: Runtime, data: Data, writer: ResultWriter, resume: bool
) -> list[dict[str, Any]]:
    with propagate_errors():
        _check(folder, config, runtime, data, resume=resume)
    dense = Trained(*load_model(folder))
    with propagate_errors():
        check_classes(folder, dense.found, data.splits)
        if runtime.is_main and config.prune.finetunes:  # otherwise the probes say it
            report_changed_data(folder, dense.found, config, data.fingerprint)
    rounds, selected = config.prune.rounds, dict[float, Selection]()
    if config.prune.schedule != "iterative":
        selected = _select(folder, config, rounds, runtime, data, dense)
    results, trained, removed, learned = [], dense, 0.0, None
    for rate in rounds:
        pruned = pruned_config(folder, config, rate)
        if rate not in selected:  # iterative: of the round before
            selected = _select(folder, config, (rate,), runtime, data, trained, removed, learned)
        chosen, base = selected[rate], trained
        learned = chosen.learned
        if runtime.is_main and chosen.plan is None:
            warn_of_masks(config, rate, trained, chosen.masks)
        with locked(pruned.folder, runtime, warn):
            if chosen.plan is not None:
                chosen, base = settle(pruned.folder, chosen.plan, trained, runtime, resume=resume)
                pruned = with_widths(pruned, base)
            _build_run_folder(folder, pruned, base, dense, chosen, runtime, data, resume=resume)
            probed = probe(pruned.folder, pruned, runtime, data, writer=writer)
            after = Trained(*load_model(pruned.folder))
            facts = _facts(pruned, after, dense, writer, runtime) if runtime.is_main else {}
            if runtime.is_main:
                facts |= _feature_scores(pruned.folder, probed)
            entries = [{**entry, **facts, "stage": "prune"} for entry in probed]
            if runtime.is_main:
                for entry in entries:
                    writer.add(pruned.folder, entry)
                    writer.add(folder, entry)
        results += entries
        if config.prune.schedule == "iterative":
            trained, removed = after, rate
    if runtime.is_main:
        with only_told():
            draw_pruning(folder, run_folder.read_results(folder), dense.found.name)
    return results


def _select(
    folder: Path,
    config: Config,
    rates: tuple[float, ...],
    runtime: Runtime,
    data: Data,
    trained: Trained,
    removed: float = 0.0,
    learned: InverseFisher | None = None,
) -> dict[float, Selection]:
    """removed: the share of channels that the rounds before have removed; learned: see `select`."""
    if config.prune.method == "channels":
        return select_channels(folder, config, rates, runtime, data, trained, removed)
    return select(folder, config, rates, runtime, data, trained, learned)


def _check(folder: Path, config: Config, runtime: Runtime, data: Data, *, resume: bool) -> None:
    """Raise what can be known before the model is loaded."""
    check_prune(folder, config, resume=resume)
    check_probes(config, data.splits)
    check_data(config, data)
    run_folder.check_results(folder)
    if config.prune.rewind is not None:
        check_rewind(folder, config, training_length(config, data, runtime)[0])
    if config.prune.fits_classifier:
        data.splits.check_two_classes("cross_entropy")
        PROBES["linear"].check("probe.linear", config.probe.linear, data.splits)
    if config.prune.schedule == "gradual":
        for rate in config.prune.rates:
            pruned = pruned_config(folder, config, rate)
            gradual_pruning(pruned, 0.0, training_length(pruned, data, runtime)[1])


def _build_run_folder(
    folder: Path,
    pruned: Config,
    trained: Trained,
    dense: Trained,
    chosen: Selection,
    runtime: Runtime,
    data: Data,
    *,
    resume: bool,
) -> None:
    """The run folder of one pruning, with a checkpoint: fine-tuned, or at step 0 without fine-tuning. Collective."""
    if not pruned.prune.finetunes:
        with propagate_errors():
            if runtime.is_main:
                _save_pruned(pruned, trained, chosen, runtime)
        return
    steps_per_epoch, length = training_length(pruned, data, runtime)
    model, found, masks, gradual = trained.model, trained.found, chosen.masks, None
    if pruned.prune.rewind is not None:
        model, found = rewound(folder, pruned, dense.found, steps_per_epoch, runtime)
        if chosen.plan is not None:
            with propagate_errors():
                early = narrowed(Trained(model, found), chosen.plan)
            model, found = early.model, early.found
    if pruned.prune.schedule == "gradual":
        masks = trained.masks
        total = sum(mask.numel() for mask in masks.values())
        gradual = gradual_pruning(pruned, 1 - sum(int(mask.sum()) for mask in masks.values()) / total, length)
    values = {} if pruned.prune.rewind is not None else chosen.values
    start = starting_point(pruned, model, found, masks, values, runtime, data, gradual)
    pretrain(pruned, runtime, data, resume=resume, online_probe=online_probe(pruned, runtime, data), start=start)


def _save_pruned(pruned: Config, trained: Trained, chosen: Selection, runtime: Runtime) -> None:
    model = copy.deepcopy(trained.model)
    set_weights(model, chosen.values)
    tensors = {"model": dict(model.state_dict())}
    if chosen.masks:
        tensors = {"masks": WeightMasks(model.encoder, chosen.masks).packed(), "model": dict(model.state_dict())}
    if "objective" in trained.found.tensors:  # for a round, or a pruning, that starts from this one
        tensors["objective"] = trained.found.tensors["objective"]
    run_folder.create(pruned.folder, pruned)
    checkpoint.save_checkpoint(
        pruned.folder / run_folder.CHECKPOINTS,
        0,
        tensors,
        {name: value for name, value in trained.found.state.items() if name not in ("step", "stopping", "gradual")},
        world_size=runtime.world_size,
        config_digest=digest(pruned),
    )


def _feature_scores(folder: Path, probed: list[dict[str, Any]]) -> dict[str, Any]:
    """What every entry of one pruning says of its features on test: the accuracy of the probe `knn`, and the
    silhouette of the classes; None where they were not asked for."""
    knn = next((entry["test"]["accuracy"] for entry in probed if entry["probe"] == "knn" and entry["test"]), None)
    embedding = run_folder.read_scores(folder).get("embedding", {}).get("encoder", {})
    return {"features": {"knn": knn, "silhouette": embedding.get("silhouette")}}


def _facts(pruned: Config, after: Trained, dense: Trained, writer: ResultWriter, runtime: Runtime) -> dict[str, Any]:
    """What results.json says about one pruning besides the scores. Writes its sparse file."""
    weights, settings = prunable(after.model.encoder), pruned.prune
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    sizes, sparse = measure(
        after.model.encoder.state_dict(), settings.values, original=dense.model.encoder.state_dict()
    )
    with writer.may_fail():
        write_sparse(pruned.folder / SPARSE, sparse)
    return {
        "folder": f"{PRUNED}/{pruned.folder.name}",
        "prune": {
            "method": settings.method,
            # a pattern does not prune every layer
            "rate": settings.rates[0] if settings.pattern is None else round(sum(zeros.values()) / total, 4),
            "scope": settings.scope,
            "schedule": settings.schedule,
            "label": settings.label,
            "loss": settings.loss if settings.measures else None,
            "rewind": settings.rewind,
            "finetune_loss": settings.finetune.loss if settings.finetunes else None,
            "finetune_steps": after.found.state["step"],
            "zeros": sum(zeros.values()),
            "weights": total,
            "rates": {name: round(zeros[name] / weight.numel(), 4) for name, weight in weights.items()},
            "emptied": [name for name, weight in weights.items() if zeros[name] == weight.numel()],
            "skipped": [] if settings.pattern is None else misfits(weights, settings.pattern[1]),
            "dense_checkpoint": dense.found.name,
        },
        "size": sizes,
        "cost": cost_of(pruned, dense.model, after, runtime),
    }
