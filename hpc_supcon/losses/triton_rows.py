"""The Triton kernels of single rows: their normalization, forward and backward, and the range of their class.

The normalization does what the PyTorch operations in gathered.py do: rows are taken in sorted order, divided by their
length and scaled; the gradient is written back in the original order. Imported only when it is used.
"""

# Triton reads the annotations of a kernel: its parameters cannot carry Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_sizes import ceil_div, power_of_2

_ELEMENTS = 4096
_COLUMNS = 256


@triton.jit
def round_to_tf32(x):
    """fp32 rounded to 10 bits of mantissa.

    The tensor cores ignore the other bits of fp32, which without rounding is an error of one sign.
    """
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _forward_kernel(
    x, order, scale, factor, u, inverse_length, n, D, row_stride, width, zero_row,
    HAS_ORDER: tl.constexpr, TF32: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """u [n, width]: rows x[order] of length `scale` (a pointer) * factor in u's dtype, zero beyond D.

    inverse_length [n]: 1 / |x[order]|. TF32: see round_to_tf32.
    """
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
    rows *= ((tl.load(scale) * factor).to(tl.float32) / length)[:, None]
    if TF32:
        rows = round_to_tf32(rows)
    to = u + i.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(to, rows.to(u.dtype.element_ty), mask=row_in[:, None] & (d < width)[None, :])
    tl.store(inverse_length + i, 1.0 / length / largest, mask=row_in)


@triton.jit
def _backward_kernel(
    grad_u, factor, x, order, scale, inverse_length, grad_x, radial_out, n, D, row_stride, width, splits,
    HAS_FACTOR: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_RADIAL: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grad_x[order] = (g - z (g . z)) scale / |x|, with g the sum of grad_u [splits, n, width] over splits times
    `factor` (a pointer), and z = x[order] / |x|; radial_out [n]: g . z scale."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = i < n
    d = tl.arange(0, DEPTH)
    inside = row_in[:, None] & (d < D)[None, :]
    at = grad_u + i.to(tl.int64)[:, None] * width + d[None, :]
    grad = tl.zeros([ROWS, DEPTH], tl.float32)
    for _ in range(splits):
        grad += tl.load(at, mask=inside, other=0.0)
        at += n.to(tl.int64) * width
    row = i.to(tl.int64)
    if HAS_ORDER:
        row = tl.load(order + i, mask=row_in, other=0)
    z = tl.load(x + row[:, None] * row_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_length + i, mask=row_in, other=0.0)
    z *= inverse[:, None]
    radial = tl.sum(grad * z, 1)
    size = tl.load(scale).to(tl.float32)
    if HAS_FACTOR:
        size *= tl.load(factor)
    out = (grad - z * radial[:, None]) * (inverse * size)[:, None]
    tl.store(grad_x + row[:, None] * D + d[None, :], out.to(grad_x.dtype.element_ty), mask=inside)
    if HAS_RADIAL:
        tl.store(radial_out + i, radial * size, mask=row_in)


@triton.jit
def _search(labels, label, low, high, steps, active, BEYOND: tl.constexpr):
    """The first position in low .. high whose label is not below `label`, or with BEYOND is above it."""
    for _ in range(steps):
        middle = (low + high) // 2
        searching = active & (low < high)
        found = tl.load(labels + middle, mask=searching, other=0)
        after = found <= label if BEYOND else found < label
        low = tl.where(searching & after, middle + 1, low)
        high = tl.where(searching & ~after, middle, high)
    return low


@triton.jit
def _bounds_kernel(labels, order, bounds, m, n, own_start, steps, HAS_ORDER: tl.constexpr, COLUMNS: tl.constexpr):
    """bounds [3, n] int32 of the own rows, as in sums_kernel. Column j is row order[j] (without HAS_ORDER: row j),
    its label labels[j] [m] int64, ascending; rows own_start .. own_start + n are the own ones."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < m
    row = column
    if HAS_ORDER:
        row = tl.load(order + column, mask=inside, other=-1).to(tl.int32)
    i = row - own_start
    own = inside & (i >= 0) & (i < n)
    label = tl.load(labels + column, mask=own, other=0)
    first = _search(labels, label, tl.zeros_like(column), column, steps, own, False)
    stop = _search(labels, label, column + 1, tl.zeros_like(column) + m, steps, own, True)
    tl.store(bounds + i, first, mask=own)
    tl.store(bounds + n + i, stop, mask=own)
    tl.store(bounds + 2 * n + i, column, mask=own)


def normalize(
    x_ND: Tensor,
    order_N: Tensor | None,
    scale: Tensor,
    zero_row: float,
    *,
    factor: float = 1.0,
    dtype: torch.dtype = torch.float32,
    width: int | None = None,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x[order] at length `scale` * factor as `dtype`, [N, width], zero beyond D; 1 / |x| [N, 1]).

    `scale`: 0-dim, on the device of x. `tf32`: rounded to that format. `width`: None: D.
    """
    x_ND = unit_stride(x_ND)
    n, d = x_ND.shape
    width = d if width is None else width
    u_ND = torch.empty(n, width, dtype=dtype, device=x_ND.device)
    inverse_N1 = torch.empty(n, 1, dtype=torch.float32, device=x_ND.device)
    if n:
        grid, shape = _launch(n, width)
        sizes = (n, d, x_ND.stride(0), width, zero_row)
        _forward_kernel[grid](
            x_ND, order_N, scale, factor, u_ND, inverse_N1, *sizes, order_N is not None, tf32, *shape
        )
    return u_ND, inverse_N1


def normalize_backward(
    grad_u: Tensor,
    x_ND: Tensor,
    order_N: Tensor | None,
    scale: Tensor,
    inverse_N1: Tensor,
    *,
    radial: bool,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(the gradient by x [N, D], in its dtype and order; with `radial`, grad_u . u of every row [N]).

    `grad_u`: the gradient by the rows that `normalize` gives for factor 1, [N, width], or parts of it to be added,
    [splits, N, width]. `factor`: multiplies it, 0-dim fp32 on the device.
    """
    x_ND, grad_u = unit_stride(x_ND), grad_u.contiguous()
    (n, d), width = x_ND.shape, grad_u.shape[-1]
    grad_ND = torch.empty(n, d, dtype=x_ND.dtype, device=x_ND.device)
    radial_N = torch.empty(n, dtype=torch.float32, device=x_ND.device) if radial else None
    if n:
        grid, shape = _launch(n, d)
        sizes = (n, d, x_ND.stride(0), width, grad_u.shape[0] if grad_u.ndim == 3 else 1)
        tensors = (grad_u, factor, x_ND, order_N, scale, inverse_N1, grad_ND, radial_N)
        _backward_kernel[grid](*tensors, *sizes, factor is not None, order_N is not None, radial, *shape)
    return grad_ND, radial_N


def class_bounds(labels_M: Tensor, order_M: Tensor | None, own_start: int, n: int) -> Tensor:
    """[3, n] int32: the range of columns of each own row's class (first, stop), and the column that is the row.

    labels_M: ascending; column j is row order_M[j]. The own rows are own_start .. own_start + n.
    """
    m = len(labels_M)
    bounds = torch.empty(3, n, dtype=torch.int32, device=labels_M.device)
    if n:
        sizes = (m, n, own_start, m.bit_length())
        _bounds_kernel[(ceil_div(m, _COLUMNS),)](labels_M, order_M, bounds, *sizes, order_M is not None, _COLUMNS)
    return bounds


def unit_stride(x_ND: Tensor) -> Tensor:
    """x, copied unless its rows are contiguous."""
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()


def _launch(n: int, width: int) -> tuple[tuple[int], tuple[int, int]]:
    """(the grid, (ROWS, DEPTH))."""
    depth = power_of_2(width)
    rows = max(1, _ELEMENTS // depth)
    return (ceil_div(n, rows),), (rows, depth)
