"""Conversion between the partitioned state of ZeRO 1 and 2 (Rajbhandari et al. 2020) and that of a whole model.

DeepSpeed concatenates the weights of each parameter group in one flat buffer. Every rank has an equal part of it in
its optimizer (with the slots of that part), and the same part of the averaged gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...distributed.collectives import all_sum, gather_rows, rank
from ...errors import ConfigError
from .base import like_slot


class Partitions:
    """The parts that DeepSpeed's optimizer `zero` has on this rank; `parameters` by their names in a checkpoint."""

    def __init__(self, zero: Any, parameters: dict[str, nn.Parameter]) -> None:
        self._zero = zero
        self._names = {id(p): name for name, p in parameters.items()}

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the averaged gradients, which may be changed in place; valid from backward to step."""
        return [g for part in self._zero.averaged_gradients.values() if part is not None for g in part]

    def squared_norm(self) -> Tensor:
        """Squared norm of the whole averaged gradient (0-dim). Collective."""
        parts = self.gradients()
        own = torch.stack(torch._foreach_norm(parts)).square().sum()
        return all_sum(own)

    def tensors(self) -> dict[str, Tensor]:
        """The whole optimizer's state as `parameter/slot` -> tensor, on every rank. Collective."""
        out: dict[str, Tensor] = {}
        for group, state in self._groups():
            for key in sorted(state):
                value = state[key]
                if not isinstance(value, Tensor):
                    continue
                whole = None if value.ndim == 0 else gather_rows(value)
                for name, p, start in self._members(group):
                    out[f"{name}/{key}"] = (
                        value.clone() if whole is None else whole[start : start + p.numel()].view(p.shape)
                    )
        return out

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load this rank's part of `tensors`, and of the model's current weights. Raises ConfigError."""
        self._zero.refresh_fp32_params()
        optimizer = self._zero.optimizer
        optimizer.state.clear()
        for i, master in enumerate(self._zero.single_partition_of_fp32_groups):
            members = list(self._members(i))
            keys = sorted({key for name, _, _ in members for key in _slots(tensors, name)})
            for key in keys:
                values = [(tensors.get(f"{name}/{key}"), p, start) for name, p, start in members]
                if key == "step":
                    value = _common_count([(name, tensors.get(f"{name}/step")) for name, _, _ in members])
                else:
                    value = self._own_part(i, values)
                optimizer.state[master][key] = like_slot(master, key, value, optimizer)

    def _own_part(self, group: int, values: list[tuple[Tensor | None, nn.Parameter, int]]) -> Tensor:
        """This rank's part of the flat buffer with these `values`, (value, parameter, start), zeros elsewhere."""
        flat = self._zero.bit16_groups_flat[group]
        whole = torch.zeros(flat.numel(), dtype=torch.float32)
        for value, p, start in values:
            if value is not None:
                whole[start : start + p.numel()] = value.reshape(-1).cpu()
        size = self._zero.single_partition_of_fp32_groups[group].numel()
        return whole[rank() * size : (rank() + 1) * size]

    def _groups(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, master in enumerate(self._zero.single_partition_of_fp32_groups):
            yield i, self._zero.optimizer.state.get(master, {})

    def _members(self, group: int) -> Iterator[tuple[str, nn.Parameter, int]]:
        """(name, parameter, its start in the flat buffer): the parameters are views of that buffer."""
        flat = self._zero.bit16_groups_flat[group]
        for p in self._zero.bit16_groups[group]:
            yield self._names[id(p)], p, (p.data_ptr() - flat.data_ptr()) // flat.element_size()


def _slots(tensors: dict[str, Tensor], name: str) -> list[str]:
    return [full.rpartition("/")[2] for full in tensors if full.rpartition("/")[0] == name]


def _common_count(steps: list[tuple[str, Tensor | None]]) -> Tensor:
    """The number of steps of a group, for which ZeRO has one counter. Raises ConfigError where its members differ."""
    counts = {name: 0.0 if t is None else float(t) for name, t in steps}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=lambda n: counts[n]), max(counts, key=lambda n: counts[n])
        raise ConfigError(
            f"train.deepspeed.zero has one step counter for all weights, but this checkpoint has "
            f"{counts[many]:g} of {many} and {counts[few]:g} of {few}; go on with train.engine=ddp"
        )
    return torch.tensor(next(iter(counts.values())))
