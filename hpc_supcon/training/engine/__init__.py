"""Engines by name: how a model is distributed over ranks, run in which number format, and updated."""

from __future__ import annotations

from collections.abc import Callable

from .base import Engine, EngineParts, LossScale, autocast, compiler, loss_precision, place, unscaled
from .checks import check_engine
from .ddp import DdpEngine, distribute
from .deepspeed import DeepSpeedEngine

__all__ = [
    "ENGINES",
    "Engine",
    "EngineParts",
    "LossScale",
    "autocast",
    "check_engine",
    "compiler",
    "distribute",
    "loss_precision",
    "place",
    "unscaled",
]

ENGINES: dict[str, Callable[..., Engine]] = {"ddp": DdpEngine, "deepspeed": DeepSpeedEngine}
