"""The partitioned state of ZeRO 1 and 2 (Rajbhandari et al. 2020), in the layout of a whole model and back.

DeepSpeed lays the weights of each parameter group end to end in one flat buffer, of which every rank holds an
equal part in its optimizer (with the slots of that part), and of whose averaged gradient every rank holds its part.
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
    """What DeepSpeed's optimizer `zero` holds on this rank; `parameters` by their names in a checkpoint."""

    def __init__(self, zero: Any, parameters: dict[str, nn.Parameter]) -> None:
        self._zero = zero
        self._names = {id(p): name for name, p in parameters.items()}

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the averaged gradients, which may be changed in place; valid from backward to step."""
        return [g for part in self._zero.averaged_gradients.values() if part is not None for g in part]

    def squared_norm(self) -> Tensor:
        """Of the whole averaged gradient (0-dim). Collective."""
        parts = self.gradients()
        own = torch.stack(torch._foreach_norm(parts)).square().sum()
        return all_sum(own)

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as `parameter/slot` -> tensor, whole, on every rank. Collective."""
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
        """Take this rank's part of `tensors`, and of the weights as they are now. Raises ConfigError."""
        self._zero.refresh_fp32_params()
        optimizer = self._zero.optimizer
        optimizer.state.clear()
        for i, master in enumerate(self._zero.single_partition_of_fp32_groups):
            members = list(self._members(i))
            keys = sorted({key for name, _, _ in members for key in _slots(tensors, name)})
            for key in keys:
                held = [(tensors.get(f"{name}/{key}"), p, start) for name, p, start in members]
                if key == "step":
                    value = _common_count([(name, tensors.get(f"{name}/step")) for name, _, _ in members])
                else:
                    value = self._own_part(i, held)
                optimizer.state[master][key] = like_slot(master, key, value, optimizer)

    def _own_part(self, group: int, held: list[tuple[Tensor | None, nn.Parameter, int]]) -> Tensor:
        """This rank's part of the flat buffer that `held`, (value, parameter, start), fills; zeros where nothing."""
        flat = self._zero.bit16_groups_flat[group]
        whole = torch.zeros(flat.numel(), dtype=torch.float32)
        for value, p, start in held:
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
    """The number of steps of a whole group, which ZeRO counts once. Raises ConfigError where they differ."""
    counts = {name: 0.0 if t is None else float(t) for name, t in steps}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=lambda n: counts[n]), max(counts, key=lambda n: counts[n])
        raise ConfigError(
            f"train.deepspeed.zero counts the steps of all weights together, but this checkpoint has "
            f"{counts[many]:g} of {many} and {counts[few]:g} of {few}; go on with train.engine=ddp"
        )
    return torch.tensor(next(iter(counts.values())))
