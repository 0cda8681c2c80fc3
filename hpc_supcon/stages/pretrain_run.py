"""A whole pre-training: the stage, its curves, and of an autoencoder its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import Config
from ..distributed.launch import Runtime
from ..evaluation.monitor import online_probe
from ..evaluation.plots import draw_training_curves
from ..terminal import only_told
from ..training.callbacks import Callback
from ..training.data import Data
from .pretrain import pretrain
from .reconstruct import evaluate_autoencoder
from .results import ResultWriter


def pretrain_and_draw(
    config: Config,
    runtime: Runtime,
    data: Data,
    *,
    resume: bool,
    writer: ResultWriter,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Pre-train, draw the curves (and an autoencoder's images); returns the run folder. Collective.

    Arguments and errors: see `pretrain`. writer: of a caller that calls its `check`.
    """
    monitored = online_probe(config, runtime, data)
    folder = pretrain(config, runtime, data, resume=resume, online_probe=monitored, callbacks=callbacks)
    with only_told():
        if runtime.is_main:
            draw_training_curves(folder, title=config.report.title)
    if "reconstruction" in config.loss.weights:
        evaluate_autoencoder(folder, config, runtime, data, writer=writer)
    return folder
