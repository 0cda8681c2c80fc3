"""The normalization of the rows, forward and backward, as one Triton kernel each.

They do what the PyTorch operations in gathered.py do: rows are taken in sorted order, divided by their length and
scaled; the gradient is written back in the original order. Imported only when it is used.
"""

# Triton reads the annotations of a kernel: its parameters cannot carry Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_DIM = 2048
"""Widest rows: a program holds whole rows in registers."""
_ELEMENTS = 4096


@triton.jit
def _forward_kernel(
    x, order, scale, u, inverse_length, n, D, row_stride, zero_row,
    HAS_ORDER: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """u [n, D] fp32: rows x[order] of length `scale` (a pointer to fp64); inverse_length [n]: 1 / |x[order]|."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = i < n
    source = i.to(tl.int64)
    if HAS_ORDER:
        source = tl.load(order + i, mask=row_in, other=0)
    d = tl.arange(0, DEPTH)
    inside = row_in[:, None] & (d < D)[None, :]
    rows = tl.load(x + source[:, None] * row_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    # Divide by the largest entry first: squaring rows of 1e30, or of 1e-30, leaves the range of fp32.
    largest = tl.max(tl.abs(rows), 1)
    largest = tl.where(largest > zero_row, largest, 1.0)
    rows = rows / largest[:, None]
    length = tl.sqrt(tl.sum(rows * rows, 1))
    length = tl.where(length > 0, length, 1.0)
    factor = tl.load(scale).to(tl.float32) / length
    tl.store(u + i.to(tl.int64)[:, None] * D + d[None, :], rows * factor[:, None], mask=inside)
    tl.store(inverse_length + i, 1.0 / length / largest, mask=row_in)


@triton.jit
def _backward_kernel(
    grad_u, u, order, scale, inverse_length, grad_x, radial_out, n, D,
    HAS_ORDER: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grad_x[order] = (grad_u - u (grad_u . u) / scale^2) scale / |x|, and radial_out [n]: grad_u . u."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = i < n
    d = tl.arange(0, DEPTH)
    inside = row_in[:, None] & (d < D)[None, :]
    at = i.to(tl.int64)[:, None] * D + d[None, :]
    grad = tl.load(grad_u + at, mask=inside, other=0.0)
    rows = tl.load(u + at, mask=inside, other=0.0)
    radial = tl.sum(grad * rows, 1)
    size = tl.load(scale).to(tl.float32)
    factor = tl.load(inverse_length + i, mask=row_in, other=0.0) * size
    target = i.to(tl.int64)
    if HAS_ORDER:
        target = tl.load(order + i, mask=row_in, other=0)
    out = (grad - rows * (radial / (size * size))[:, None]) * factor[:, None]
    tl.store(grad_x + target[:, None] * D + d[None, :], out.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(radial_out + i, radial, mask=row_in)


def normalize(x_ND: Tensor, order_N: Tensor | None, scale: Tensor, zero_row: float) -> tuple[Tensor, Tensor]:
    """(u [N, D] fp32, 1 / |x| [N, 1]); `scale`: 0-dim fp64, on the device of x."""
    x_ND = x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()
    n, d = x_ND.shape
    u_ND = torch.empty(n, d, dtype=torch.float32, device=x_ND.device)
    inverse_N1 = torch.empty(n, 1, dtype=torch.float32, device=x_ND.device)
    grid, shape = _launch(n, d)
    if n:
        _forward_kernel[grid](
            x_ND, order_N, scale, u_ND, inverse_N1, n, d, x_ND.stride(0), zero_row, order_N is not None, *shape
        )
    return u_ND, inverse_N1


def normalize_backward(
    grad_u_ND: Tensor, u_ND: Tensor, order_N: Tensor | None, scale: Tensor, inverse_N1: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(the gradient by x [N, D] of `dtype`, in the original order; grad_u . u of every row [N])."""
    n, d = u_ND.shape
    grad_ND = torch.empty(n, d, dtype=dtype, device=u_ND.device)
    radial_N = torch.empty(n, dtype=torch.float32, device=u_ND.device)
    grid, shape = _launch(n, d)
    if n:
        _backward_kernel[grid](
            grad_u_ND.contiguous(), u_ND, order_N, scale, inverse_N1, grad_ND, radial_N, n, d, order_N is not None,
            *shape,
        )  # fmt: skip
    return grad_ND, radial_N


def _launch(n: int, d: int) -> tuple[tuple[int], tuple[int, int]]:
    """(the grid, (ROWS, DEPTH))."""
    depth = triton.next_power_of_2(d)
    rows = max(1, _ELEMENTS // depth)
    return (triton.cdiv(n, rows),), (rows, depth)
