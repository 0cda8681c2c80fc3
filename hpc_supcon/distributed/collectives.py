"""Collective operations: sums and gathers over ranks, and errors that every rank raises.

All ranks must call each of them, in the same order. Without a process group they work as for a single rank, so
that callers have one code path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import HpcSupconError
from ..phases import phase

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks, for code that is given no launch.Runtime."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, for code that is given no launch.Runtime."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_objects(value: T) -> list[T]:
    """`value` of every rank, in rank order, on every rank. For small objects in host memory only: it pickles."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_sum(value: Tensor) -> Tensor:
    """Sum of `value` (any shape, the same on every rank) over ranks: a new tensor without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        with phase("gather"):
            dist.all_reduce(total)
    return total


class _SumWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * world_size()


def sum_with_grad(x: Tensor) -> Tensor:
    """Differentiable `all_sum` of x (any shape), for sums from which every rank computes the same loss.

    Its incoming gradient is then equal on all ranks, and the gradient of x is that of the sum of all ranks' losses
    without another message.
    """
    return x if world_size() == 1 else _SumWithGrad.apply(x)


def gather_rows(x: Tensor, rows: list[int] | None = None) -> Tensor:
    """Concatenation of x [n_r, ...] over ranks along dim 0, in rank order, without gradient.

    rows: the number of rows of every rank, if the caller knows it; otherwise it is gathered first. Ranks may have
    different numbers of rows, including 0. Returns [sum n_r, ...].
    """
    x = x.detach()
    if world_size() == 1:
        return x
    with phase("gather"):
        rows = rows if rows is not None else gather_sizes(x)
        if x.dtype == torch.uint16:  # which no backend sends
            return _gather_rows(x.contiguous().view(torch.uint8), rows).view(torch.uint16)
        return _gather_rows(x, rows)


def gather_rows_of(tensors: list[Tensor], rows: list[int] | None = None) -> list[Tensor]:
    """`gather_rows` of each of the tensors [n_r, ...], in one message: their rows travel side by side, as bytes."""
    if world_size() == 1:
        return [x.detach() for x in tensors]
    parts = [x.detach().flatten(1) if x.ndim > 1 else x.detach()[:, None] for x in tensors]
    # copied in units of the narrowest dtype, then sent as bytes, which every backend can send
    unit = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[min(x.element_size() for x in tensors)]
    columns = [part.contiguous().view(unit) for part in parts]
    message = gather_rows(torch.cat(columns, dim=1).view(torch.uint8), rows).view(unit)
    found = message.split([part.shape[1] for part in columns], dim=1)
    return [
        part.contiguous().view(x.dtype).view(len(message), *x.shape[1:])
        for part, x in zip(found, tensors, strict=True)
    ]


def _gather_rows(x: Tensor, rows: list[int]) -> Tensor:
    largest = max(rows)
    if all(n == largest for n in rows):
        out = x.new_empty((len(rows) * largest, *x.shape[1:]))
        _all_gather(out, x.contiguous())
        return out
    padded = x.new_zeros((largest, *x.shape[1:]))
    padded[: x.shape[0]] = x
    out = x.new_empty((len(rows) * largest, *x.shape[1:]))
    _all_gather(out, padded)
    return torch.cat([part[:n] for part, n in zip(out.split(largest), rows, strict=True)])


def _all_gather(out: Tensor, x: Tensor) -> None:
    # PyTorch 2.14 warns about the older name in every process; 2.13 does not have the newer one
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x)


def gather_sizes(x: Tensor) -> list[int]:
    """Number of rows of x on every rank."""
    if world_size() == 1:
        return [x.shape[0]]
    sizes = torch.empty(world_size(), dtype=torch.int64, device=x.device)
    _all_gather(sizes, torch.tensor([x.shape[0]], device=x.device))
    return [int(n) for n in sizes.tolist()]


class _GatherWithGrad(torch.autograd.Function):
    """gather_rows whose backward SUMS the incoming gradients over ranks before it takes this rank's slice.

    Taking this rank's slice without the sum is a common mistake: the direction of the gradient is then wrong, and
    tests with symmetric data do not show it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int]) -> Tensor:
        ctx.rows = rows
        return gather_rows(x, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total = all_sum(grads[0].contiguous())
        start = sum(ctx.rows[: rank()])
        return total[start : start + ctx.rows[rank()]], None


def gather_rows_with_grad(x: Tensor, rows: list[int] | None = None) -> Tensor:
    """Differentiable `gather_rows`: the gradient of x is that of the sum of all ranks' losses."""
    if world_size() == 1:
        return x
    return _GatherWithGrad.apply(x, rows if rows is not None else gather_sizes(x))


@contextmanager
def propagate_errors() -> Iterator[None]:
    """A named error that any rank raises in this block is raised on every rank when the block ends.

    Without it, the ranks that succeeded would wait in their next collective until the timeout. The block must not
    contain collectives itself: a rank that fails would skip them.
    """
    error: HpcSupconError | None = None
    try:
        yield
    except HpcSupconError as caught:
        error = caught
    raise_on_all_ranks(error)


def raise_on_all_ranks(error: HpcSupconError | None) -> None:
    """Raise the error of the lowest rank that has one on every rank; return when no rank has one."""
    errors = gather_objects(error)
    for origin, first in enumerate(errors):
        if first is not None:
            same_everywhere = all(e is not None and e.args == first.args for e in errors)
            message = str(first) if same_everywhere else f"rank {origin}: {first}"
            common = type(first)(message)
            common.on_all_ranks = True
            raise common from error
