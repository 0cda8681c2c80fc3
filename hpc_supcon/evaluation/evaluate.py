"""Stage `probe`: a run folder's encoder, frozen, to results.json."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..collectives import gather_rows, together
from ..config import Config
from ..data import EvalTransform, Source, Splits
from ..errors import CheckpointCorrupt, ConfigError, DataError
from ..models import PretrainingModel
from ..runtime import Runtime
from ..training import assemble, checkpoint, run_folder
from ..training.engine import place
from ..training.metrics import MetricLog
from .features import extract
from .probes import train_linear_probe
from .scores import classification_scores


def check_probe(config: Config, splits: Splits) -> None:
    """Raise ConfigError where the probe's choices cannot be made. Cheap: meant for before training."""
    if splits.validation is None and len(config.probe.lrs) > 1:
        raise ConfigError(
            f"probe.lrs has {len(config.probe.lrs)} learning rates but there is no validation split to choose on: "
            "give one rate, or set data.validation_fraction"
        )


def load_model(folder: Path) -> tuple[PretrainingModel, checkpoint.Checkpoint]:
    """The model of a run's newest verified checkpoint, on the CPU. Raises CheckpointCorrupt."""
    found, _ = checkpoint.load_newest(folder / run_folder.CHECKPOINTS)
    if found is None:
        raise CheckpointCorrupt(f"{folder}: no checkpoint in it; run `hpc-supcon pretrain` first")
    with checkpoint.understood(found.path):
        model = assemble.build_model(found.state)
        model.load_state_dict(found.tensors.get("ema", found.tensors["model"]))
        EvalTransform(**found.state["normalisation"])  # read later: wrong ones are found here
        tuple(found.state["classes"])
    return model, found


def probe(folder: Path, config: Config, runtime: Runtime, data: assemble.Data) -> dict[str, Any]:
    """Linear evaluation of the newest checkpoint; the entry written into results.json. Collective.

    Learning rate and epoch are chosen on validation; the test set is read once, at the end.
    """
    began, splits = time.perf_counter(), data.splits
    with together():
        check_probe(config, splits)
        model, found = load_model(folder)
        if tuple(found.state["classes"]) != splits.classes:
            raise DataError(
                f"{folder}: trained on classes {found.state['classes']}, the data has {list(splits.classes)}"
            )
    encoder = place(model.encoder, runtime, channels_last=config.train.channels_last)
    transform = EvalTransform(**found.state["normalisation"]).to(runtime.device)

    def features(source: Source) -> Any:
        return extract(encoder, source, transform, runtime, loader=data.loader, options=data.evaluation)

    train = tuple(gather_rows(part) for part in features(splits.train))
    validation = features(splits.validation) if splits.validation is not None else None
    settings = config.probe
    head = train_linear_probe(
        train,  # type: ignore[arg-type]
        validation,
        classes=len(splits.classes),
        lrs=settings.lrs,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimiser=settings.optimiser,
        weight_decay=settings.weight_decay,
        standardise=settings.standardise,
        seed=config.seed,
    )

    def scores(part: Any) -> dict[str, float]:
        return classification_scores(head.predict(part[0]), part[1], len(splits.classes))

    result = {
        "stage": "probe",
        "probe": settings.kind,
        "encoder": config.model.encoder,
        "loss": config.loss.name,
        "checkpoint": found.path.name,
        "chosen": {"lr": head.lr, "epoch": head.epoch},
        "validation": scores(validation) if validation is not None else None,
        "test": scores(features(splits.test)),
        "seconds": round(time.perf_counter() - began, 2),
    }
    with together():
        if runtime.is_main:
            run_folder.add_result(folder, result)
    with MetricLog(folder if runtime.is_main else None, tensorboard=False) as log:
        log.log("probe", found.state["step"], **{k: result[k] for k in ("chosen", "validation", "test")})
    return result
