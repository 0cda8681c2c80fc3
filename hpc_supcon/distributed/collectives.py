"""What ranks tell each other: gather, agree, fail together.

Every function works without a process group too (one process is a world of one), so that callers have
one code path. All ranks must call each of them, in the same order.
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
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: T) -> list[T]:
    """`value` of every rank, in rank order, on every rank. For small host objects only (it pickles)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_sum(value: Tensor) -> Tensor:
    """Sum of `value` over ranks (any shape, the same on every rank); a new tensor without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        with phase("gather"):
            dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """True on every rank when `flag` is true on at least one: how ranks agree on a branch."""
    if world_size() == 1:
        return flag
    votes = torch.tensor([int(flag)], device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def gather_rows(x: Tensor, rows: list[int] | None = None) -> Tensor:
    """Concatenation of x [n_r, ...] over ranks along dim 0, in rank order, without gradient.

    `rows` is the number of rows of every rank where the caller knows it (saves a round of messages);
    ranks may hold different numbers of rows, none included. Returns [sum n_r, ...].
    """
    x = x.detach()
    if world_size() == 1:
        return x
    with phase("gather"):
        return _gather_rows(x, rows if rows is not None else gather_sizes(x))


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
    # the older name makes PyTorch 2.14 warn every user in every process; 2.13 does not know the newer
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
    """gather_rows whose backward SUMS the incoming gradients over ranks before taking the own slice.

    Taking the own slot first is the classic mistake: the direction of the gradient is then wrong, and
    symmetric test data hide it.
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
    """As `gather_rows`, differentiable: each rank's gradient is the sum over all ranks' losses."""
    if world_size() == 1:
        return x
    return _GatherWithGrad.apply(x, rows if rows is not None else gather_sizes(x))


@contextmanager
def together() -> Iterator[None]:
    """All ranks leave this block the same way: a named error on any rank is raised on every rank.

    Without it, the ranks that succeeded would wait in their next collective until the time-out. The
    block itself must not hold collectives that a failing rank would skip.
    """
    error: HpcSupconError | None = None
    try:
        yield
    except HpcSupconError as caught:
        error = caught
    raise_together(error)


def raise_together(error: HpcSupconError | None) -> None:
    """Raise the lowest rank's error on every rank; return when no rank has one."""
    errors = gather_objects(error)
    for origin, first in enumerate(errors):
        if first is not None:
            same_everywhere = all(e is not None and e.args == first.args for e in errors)
            message = str(first) if same_everywhere else f"rank {origin}: {first}"
            raise type(first)(message) from error
