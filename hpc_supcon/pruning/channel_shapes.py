"""Units of channels: sets that can be merged, and how they follow a value whose shape changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Flow:
    """The units of a value's channels."""

    dim: int
    units: Indices
    """[size of that dimension]"""
    zero: bool
    """Whether a channel is zero everywhere once its unit is removed."""


class Units:
    """Numbered sets, of which any two can be made one (union-find). Number 0 is the set of what is kept."""

    def __init__(self) -> None:
        self._parents = [0]

    def new(self, count: int) -> Indices:
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count, dtype=np.int64)

    def tie(self, a: Indices, b: Indices) -> None:
        """Make the units of each pair one."""
        for i, j in {*zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)}:
            low, high = sorted((self._find(i), self._find(j)))
            self._parents[high] = low

    def freeze(self, units: Indices) -> None:
        self.tie(units, np.zeros_like(units))

    def numbered(self, used: Iterable[Indices]) -> Indices:
        """For every unit its set: 0, or 1, 2, ... in order of appearance in `used`."""
        numbers, result = {0: 0}, np.zeros(len(self._parents), np.int64)
        for units in used:
            for unit in units.tolist():
                result[unit] = numbers.setdefault(self._find(unit), len(numbers))
        return result

    def _find(self, unit: int) -> int:
        while self._parents[unit] != unit:
            self._parents[unit] = self._parents[self._parents[unit]]
            unit = self._parents[unit]
        return unit


def reshaped(flow: Flow, before: tuple[int, ...], after: tuple[int, ...]) -> Flow | None:
    """The flow of the same values in row-major order under another shape; None where its dimension is divided.

    A dimension may be merged with others. One that is divided would be divided elsewhere with fewer channels.
    """
    if len(flow.units) == 1:
        return None
    for dims, targets in _blocks(before, after):
        if flow.dim not in dims:
            continue
        wide = [d for d in targets if after[d] > 1]
        if len(wide) != 1:
            return None
        outer = math.prod(before[d] for d in dims if d < flow.dim)
        inner = math.prod(before[d] for d in dims if d > flow.dim)
        return Flow(wide[0], np.tile(np.repeat(flow.units, inner), outer), flow.zero)
    return None


def _blocks(before: tuple[int, ...], after: tuple[int, ...]) -> Iterable[tuple[list[int], list[int]]]:
    """The smallest groups of neighboring dimensions that hold the same values before and after."""
    i = j = 0
    while i < len(before) and j < len(after):
        dims, targets, left, right = [i], [j], before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                dims.append(i)
                left, i = left * before[i], i + 1
            else:
                targets.append(j)
                right, j = right * after[j], j + 1
        yield dims, targets
