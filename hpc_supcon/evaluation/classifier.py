"""A linear classifier on an encoder's features as a head of the model: for cross-entropy after pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..data import EvalTransform, Source
from ..distributed.launch import Runtime
from ..models import PretrainingModel
from ..training.data import Data
from ..training.engine import place
from .features import IndexedRows, SplitRows, Standardize, extract_indexed
from .probes import PROBES, FittedProbe, ProbeTask

HEAD = "classifier"


def with_cross_entropy(config: Config) -> Config:
    """The settings of training with cross-entropy in place of the run's own loss."""
    changes = {"name": "cross_entropy", "terms": None, "supervised": True, "queue_size": 0}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"views": config.data.crops[0]}),  # without local views
            "loss": config.loss.model_copy(update=changes),
            "model": config.model.model_copy(update={"momentum_encoder": None}),
            "log": config.log.model_copy(update={"gradient_response": False}),
        }
    )


def with_classifier(
    model: PretrainingModel, description: Mapping[str, Any], config: Config, runtime: Runtime, data: Data
) -> PretrainingModel:
    """`model`'s encoder with the head "classifier": its own where it has one, else the linear probe of its features.

    Collective: all ranks end with the same head. The model is left in eval mode. Raises NonFinite, and what the
    loader raises.
    """
    if HEAD in model.heads:
        return PretrainingModel(model.encoder, {HEAD: model.heads[HEAD]})
    encoder = place(model.encoder, runtime, channels_last=config.train.channels_last)
    transform = EvalTransform(**description["normalization"]).to(runtime.device)

    def read(source: Source, input: str) -> IndexedRows:
        return extract_indexed(encoder, source, transform, runtime, loader=data.loader, options=data.evaluation)

    rows = SplitRows(data.splits, read)
    task = ProbeTask("linear", "features", config, runtime, data, rows, description, encoder)
    return PretrainingModel(encoder, {HEAD: as_layer(PROBES["linear"].fit(task).probe)})


@torch.no_grad()
def as_layer(probe: FittedProbe) -> nn.Linear:
    """A linear probe of features as one layer: the standardization before it becomes part of its weights."""
    assert isinstance(probe.head, nn.Linear)
    weight, bias = probe.head.weight.double(), probe.head.bias.double()
    for step in probe.prepare:
        assert isinstance(step, Standardize)
        weight = weight / step.std.double()
        bias = bias - weight @ step.mean.double()
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer
