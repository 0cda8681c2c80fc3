"""prune.method=channels: which channels of a model are removed, and the narrower model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from ..config import Config
from ..distributed.collectives import gather_objects, propagate_errors
from ..distributed.launch import Runtime
from ..errors import ConfigError, RunFolderError, first_line
from ..evaluation.prune_task import prune_task, spec_of
from ..files import write_atomically
from ..models import build_model
from ..pruning import (
    Plan,
    apply_plan,
    channel_plan,
    channel_scores,
    check_plan,
    layer_widths,
    pack,
    plan_digest,
    trace_channels,
)
from ..training.data import Data
from .pruned_weights import Selection, Trained, check_same

PLAN = "channels.json"
"""In the run folder: the entries of each tensor of the encoder before that are kept."""


def select_channels(
    folder: Path,
    config: Config,
    rates: tuple[float, ...],
    runtime: Runtime,
    data: Data,
    trained: Trained,
    removed: float = 0.0,
) -> dict[float, Selection]:
    """What each of `rates` removes of a model of which the share `removed` is gone already. Collective.

    Raises ConfigError for an encoder without channels that can be removed; RunFolderError, on all ranks, where the
    plans of one differ.
    """
    settings = config.prune
    with propagate_errors():
        graph = trace_channels(trained.model.encoder, _example(trained))
    with prune_task(folder, config, runtime, data, trained.model, trained.found) as task:
        scored = spec_of(config).score(task).scores
    selected = {}
    with propagate_errors():
        scores = channel_scores(graph, scored, relative=settings.channels.score == "l1")
        for rate in rates:
            share = max(0.0, 1 - (1 - rate) / (1 - removed))
            plan = channel_plan(graph, scores, share, settings.scope)
            selected[rate] = Selection({}, {}, plan)
    check_same(folder, [plan_digest(chosen.plan or {}) for chosen in selected.values()])
    return selected


def settle(
    folder: Path, plan: Plan, trained: Trained, runtime: Runtime, *, resume: bool
) -> tuple[Selection, Trained]:
    """(what is removed, the narrower model) of the pruning in `folder`: `plan`, which is written to PLAN; with
    `resume`, the plan of that file. Collective.

    Taylor scores of a GPU are not the same each time. Raises RunFolderError, PruningError.
    """
    path = folder / PLAN
    with propagate_errors():
        if runtime.is_main and resume and path.exists():
            plan = _read(path)
        elif runtime.is_main:
            _write(path, plan)
    plan = gather_objects(plan if runtime.is_main else None)[0] or {}
    with propagate_errors():
        try:
            smaller = narrowed(trained, plan)
            masks = apply_plan(trained.masks, plan) if "masks" in trained.found.tensors else {}
        except (IndexError, TypeError, ValueError, AttributeError, RuntimeError, ConfigError) as error:
            raise RunFolderError(f"{path}: does not fit the run's encoder: {first_line(error)}") from None
    return Selection(masks, {}, plan), smaller


def _read(path: Path) -> Plan:
    try:
        plan: Plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path}: cannot be read: {first_line(error)}") from None
    if not isinstance(plan, dict):
        raise RunFolderError(f"{path}: is no plan of channels")
    return plan


def _write(path: Path, plan: Plan) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(plan) + "\n")
    except OSError as error:
        raise RunFolderError(f"{path}: not written: {error.strerror}") from None


def narrowed(trained: Trained, plan: Plan) -> Trained:
    """The model without the channels that `plan` leaves out, its checkpoint's masks and description with it.

    Raises PruningError where its outputs are not those of the model with these channels set to zero.
    """
    found, encoder = trained.found, trained.found.state["encoder"]
    widths = encoder.get("channels", {}) | layer_widths(trained.model.encoder.state_dict(), plan)
    if not widths:
        return trained
    state = {**found.state, "encoder": {**encoder, "channels": widths}}
    model = build_model(state)
    model.load_state_dict(
        apply_plan(trained.model.state_dict(), {f"encoder.{name}": dims for name, dims in plan.items()})
    )
    check_plan(trained.model.encoder, model.encoder, plan, _example(trained))
    tensors = dict(found.tensors)
    if "masks" in tensors:
        tensors["masks"] = {name: pack(mask) for name, mask in apply_plan(trained.masks, plan).items()}
    return Trained(model, replace(found, state=state, tensors=tensors))


def with_widths(pruned: Config, trained: Trained) -> Config:
    """The settings of a run folder whose model is that of `trained`."""
    widths = trained.found.state["encoder"].get("channels")
    channels = None if widths is None else {layer: tuple(sizes) for layer, sizes in widths.items()}
    return pruned.model_copy(update={"model": pruned.model.model_copy(update={"channels": channels})})


def _example(trained: Trained) -> torch.Tensor:
    encoder = trained.found.state["encoder"]
    return torch.zeros(2, encoder["in_channels"], encoder["image_size"], encoder["image_size"])
