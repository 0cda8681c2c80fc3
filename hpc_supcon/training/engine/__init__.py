"""Engines by name: how a model is spread over ranks, run, and updated; in which number format; compiled or not."""

from __future__ import annotations

from collections.abc import Callable

from .base import Engine, Parts
from .checks import check_engine, engine_options
from .ddp import DdpEngine
from .deepspeed import DeepSpeedEngine
from .loss_scale import LossScale
from .placement import autocast, compiler, distribute, place, unscaled

__all__ = [
    "ENGINES",
    "Engine",
    "LossScale",
    "Parts",
    "autocast",
    "check_engine",
    "compiler",
    "distribute",
    "engine_options",
    "place",
    "unscaled",
]

ENGINES: dict[str, Callable[..., Engine]] = {"ddp": DdpEngine, "deepspeed": DeepSpeedEngine}
