"""Units of channels: sets that can be merged, and how operations with one input change the dimension they are in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True)
class Operation:
    """An operation of the graph with one tensor that is followed, its first argument."""

    name: str
    """Without overload, and without the underscore of operations in place."""
    args: Sequence[Any]
    before: tuple[int, ...]
    """Shape of that tensor."""
    after: tuple[int, ...]
    """Shape of the (first) result."""

    def dim(self, index: int, default: int = 0) -> int:
        """The argument that is a dimension, counted from the front."""
        return int(self.args[index] if len(self.args) > index else default) % len(self.before)


def _keep(flow: Flow, op: Operation) -> Flow | None:
    return flow


def _nonzero(flow: Flow, op: Operation) -> Flow | None:
    return replace(flow, zero=False)


def _hardtanh(flow: Flow, op: Operation) -> Flow | None:
    low, high = (*op.args[1:], -1, 1)[:2] if len(op.args) != 2 else (op.args[1], 1)
    return replace(flow, zero=flow.zero and low <= 0 <= high)


def _pool2d(flow: Flow, op: Operation) -> Flow | None:
    return flow if flow.dim == len(op.after) - 3 else None


def _pad(flow: Flow, op: Operation) -> Flow | None:
    """By zeros, of other dimensions than that of the channels."""
    value = next((a for a in op.args[2:] if a is not None and not isinstance(a, str)), 0)
    return replace(flow, zero=flow.zero and not value) if flow.dim < len(op.after) - len(op.args[1]) // 2 else None


def _reduce(flow: Flow, op: Operation) -> Flow | None:
    dims = op.args[1] if len(op.args) > 1 else None
    if dims is None or not isinstance(dims, (int, Sequence)):
        return None
    reduced = {d % len(op.before) for d in ([dims] if isinstance(dims, int) else dims)}
    if flow.dim in reduced or not reduced:
        return None
    keep = len(op.args) > 2 and bool(op.args[2])
    return flow if keep else replace(flow, dim=flow.dim - sum(d < flow.dim for d in reduced))


def _permute(flow: Flow, op: Operation) -> Flow | None:
    return replace(flow, dim=[d % len(op.before) for d in op.args[1]].index(flow.dim))


def _transpose(flow: Flow, op: Operation) -> Flow | None:
    a, b = op.dim(1), op.dim(2)
    return replace(flow, dim={a: b, b: a}.get(flow.dim, flow.dim))


def _expand(flow: Flow, op: Operation) -> Flow | None:
    dim = flow.dim + len(op.after) - len(op.before)
    return replace(flow, dim=dim) if op.after[dim] == len(flow.units) else None


def _slice(flow: Flow, op: Operation) -> Flow | None:
    """Along another dimension than that of the channels, or all of them."""
    return flow if op.after[flow.dim] == len(flow.units) else None


def _select(flow: Flow, op: Operation) -> Flow | None:
    at = op.dim(1)
    return None if at == flow.dim else replace(flow, dim=flow.dim - (at < flow.dim))


def _reshape(flow: Flow, op: Operation) -> Flow | None:
    return reshaped(flow, op.before, op.after)


_KEEP = (
    *(
        "relu",
        "relu6",
        "silu",
        "gelu",
        "elu",
        "selu",
        "celu",
        "leaky_relu",
        "hardswish",
        "mish",
        "tanh",
        "neg",
        "abs",
    ),
    *("dropout", "feature_dropout", "clone", "contiguous", "detach", "to", "_to_copy", "alias"),
)
_NONZERO = ("sigmoid", "hardsigmoid", "softplus", "log_sigmoid", "exp")
_POOL2D = (
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
)
OPERATIONS: dict[str, Callable[[Flow, Operation], Flow | None]] = {
    **dict.fromkeys(_KEEP, _keep),
    **dict.fromkeys(_NONZERO, _nonzero),
    **dict.fromkeys(_POOL2D, _pool2d),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min"), _reduce),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    "hardtanh": _hardtanh,
    "permute": _permute,
    "transpose": _transpose,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
}
"""Operation -> how the channels go on; None: it does not treat them independently."""


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
