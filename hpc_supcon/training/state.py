"""Everything that must survive: what a training step changes, and its way to and from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives import gather_rows, rank
from ..data import Views


@dataclass
class TrainState:
    """The parts of one training run on this rank. Only `step` is ever rebound."""

    model: nn.Module
    """The bare model: what is saved."""
    parallel: nn.Module
    """The same model as data-parallel training wraps it: what is called."""
    optimiser: torch.optim.Optimizer
    views: Views
    loss: nn.Module
    autocast: Callable[[], AbstractContextManager[object]]
    device: torch.device
    step: int = 0
    """Optimiser steps done."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by checkpoint file. Collective: every rank's generators are in `rng`."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": _optimiser_tensors(self.model, self.optimiser),
            "rng": self._rng(),
        }

    def load(self, tensors: dict[str, dict[str, Tensor]], step: int) -> None:
        """Go back to what `tensors` returned after `step` steps (same model, same number of ranks)."""
        self.model.load_state_dict(tensors["model"])
        _load_optimiser(self.model, self.optimiser, tensors["optimizer"])
        own = {name.partition(".")[2]: t for name, t in tensors["rng"].items() if name.startswith(f"rank{rank()}.")}
        torch.set_rng_state(own["torch"])
        self.views.load_state(own["views"])
        if "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], self.device)
        self.step = step

    def _rng(self) -> dict[str, Tensor]:
        own = {"torch": torch.get_rng_state(), "views": self.views.state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        gathered = {name: gather_rows(state[None].cpu()) for name, state in own.items()}
        return {f"rank{r}.{name}": row for name, rows in gathered.items() for r, row in enumerate(rows)}


def _named_slots(
    model: nn.Module, optimiser: torch.optim.Optimizer
) -> list[tuple[str, nn.Parameter, dict[str, Any]]]:
    return [(name, p, optimiser.state[p]) for name, p in model.named_parameters() if p in optimiser.state]


def _optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`parameter/slot` -> tensor: safetensors holds names and tensors, no nested objects."""
    slots = _named_slots(model, optimiser)
    return {f"{name}/{key}": t for name, _, state in slots for key, t in state.items() if isinstance(t, Tensor)}


def _load_optimiser(model: nn.Module, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    optimiser.state.clear()
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        p = parameters[name]
        # a slot shaped like its parameter gets its device and memory layout; a step counter stays on the CPU
        slot = torch.empty_like(p, dtype=value.dtype).copy_(value) if value.shape == p.shape and value.ndim else value
        optimiser.state[p][key] = slot
