"""The Triton backend: one kernel for the row sums, one for the gradient; no tile ever reaches memory.

Imported only when it is used. A program owns a block of rows and walks over the columns; both kernels
recompute s from u. Results do not depend on the order of execution: no atomics, partial results of column
splits are added in a fixed order. Needs sm_80 or later; under TRITON_INTERPRET=1 it runs on the CPU.
"""

# Triton reads the annotations of a kernel: its parameters cannot carry Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autograd import RowSums
from .gathered import Columns

_INTERPRETED = bool(triton.knobs.runtime.interpret)
# Output columns of one program of the gradient kernel: a wider accumulator leaves no registers for the tile.
_WIDEST_GRADIENT = 256


def _configs() -> list[Any]:
    if _INTERPRETED:
        # Several tiles in each direction at the sizes of the tests.
        return [triton.Config({"ROWS": 16, "COLS": 32}, num_warps=4, num_stages=1)]
    # Timed once per size and dtype on the device in use; one that does not fit its shared memory is skipped.
    shapes = [(128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 128, 4, 2)]
    shapes += [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)]
    return [
        triton.Config({"ROWS": rows, "COLS": cols}, num_warps=warps, num_stages=stages)
        for rows, cols, warps, stages in shapes
    ]


@triton.jit
def _load(u, rows, inside, start, D, CHUNK: tl.constexpr, UPCAST: tl.constexpr):
    """u[rows, start : start + CHUNK], zero outside."""
    d = start + tl.arange(0, CHUNK)
    block = tl.load(
        u + rows[:, None].to(tl.int64) * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0
    )
    if UPCAST:
        block = block.to(tl.float32)
    return block


@triton.jit
def _dots(
    u, rows, cols, row_in, col_in, D, CHUNK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """s [ROWS, COLS] fp32, accumulated over chunks of the feature dimension."""
    s = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, DEPTH, CHUNK):
        a = _load(u, rows, row_in, start, D, CHUNK, UPCAST)
        b = _load(u, cols, col_in, start, D, CHUNK, UPCAST)
        s = tl.dot(a, tl.trans(b), s, input_precision=PRECISION)
    return s


@triton.autotune(configs=_configs(), key=["N_BUCKET", "D", "INVERSE", "PRECISION", "UPCAST"])
@triton.jit
def _sums_kernel(
    u, ids, out, first_row, n, m, D, kappa, span, N_BUCKET,
    CHUNK: tl.constexpr, DEPTH: tl.constexpr, INVERSE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out [splits, 5, n]: sums over columns split * span .. (split + 1) * span of the rows' s and exponentials."""
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    row_in = local < n
    rows = first_row + local
    row_ids = tl.load(ids + rows, mask=row_in, other=-1)
    low, high = tl.min(tl.where(row_in, row_ids, 2147483647)), tl.max(row_ids)
    own = _load(u, rows, row_in, 0, D, CHUNK, UPCAST)
    s_pos = tl.zeros([ROWS], tl.float32)
    exp_pos = tl.zeros([ROWS], tl.float32)
    exp_neg = tl.zeros([ROWS], tl.float32)
    inv = tl.zeros([ROWS], tl.float32)
    s_inv = tl.zeros([ROWS], tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, m), COLS):
        cols = start + tl.arange(0, COLS)
        col_in = cols < m
        col_ids = tl.load(ids + cols, mask=col_in, other=-2)
        if DEPTH == CHUNK:
            other = _load(u, cols, col_in, 0, D, CHUNK, UPCAST)
            s = tl.dot(own, tl.trans(other), input_precision=PRECISION)
        else:
            s = _dots(u, rows, cols, row_in, col_in, D, CHUNK, DEPTH, PRECISION, UPCAST, ROWS, COLS)
        e = tl.where(col_in[None, :], tl.exp(s), 0.0)
        # Rows and columns are sorted by class: most tiles hold no positive pair at all.
        if (tl.min(tl.where(col_in, col_ids, 2147483647)) <= high) & (tl.max(col_ids) >= low):
            same = row_ids[:, None] == col_ids[None, :]
            positive = same & (rows[:, None] != cols[None, :])
            s_pos += tl.sum(tl.where(positive, s, 0.0), 1)
            exp_pos += tl.sum(tl.where(positive, e, 0.0), 1)
            exp_neg += tl.sum(tl.where(same, 0.0, e), 1)
            if INVERSE:
                away = tl.where(positive, tl.exp(-kappa * s), 0.0)
                inv += tl.sum(away, 1)
                s_inv += tl.sum(away * s, 1)
        else:
            exp_neg += tl.sum(e, 1)
    base = out + split * 5 * n + local
    tl.store(base, s_pos, mask=row_in)
    tl.store(base + n, exp_pos, mask=row_in)
    tl.store(base + 2 * n, exp_neg, mask=row_in)
    tl.store(base + 3 * n, inv, mask=row_in)
    tl.store(base + 4 * n, s_inv, mask=row_in)


@triton.autotune(configs=_configs(), key=["N_BUCKET", "D", "INVERSE", "PRECISION", "UPCAST"])
@triton.jit
def _gradient_kernel(
    u, ids, coefficients, out, first_row, n, m, D, kappa, span, N_BUCKET,
    CHUNK: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, INVERSE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out [splits, n, D] fp32: sum over the split's columns of (G_ij + G_ji) u_j; coefficients [4, m] fp32."""
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    d = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    row_in = local < n
    rows = first_row + local
    row_ids = tl.load(ids + rows, mask=row_in, other=-1)
    low, high = tl.min(tl.where(row_in, row_ids, 2147483647)), tl.max(row_ids)
    c_i = tl.load(coefficients + rows, mask=row_in, other=0.0)
    p_i = tl.load(coefficients + m + rows, mask=row_in, other=0.0)
    n_i = tl.load(coefficients + 2 * m + rows, mask=row_in, other=0.0)
    f_i = tl.load(coefficients + 3 * m + rows, mask=row_in, other=0.0)
    own = _load(u, rows, row_in, 0, D, CHUNK, UPCAST)
    grad = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, m), COLS):
        cols = start + tl.arange(0, COLS)
        col_in = cols < m
        col_ids = tl.load(ids + cols, mask=col_in, other=-2)
        n_j = tl.load(coefficients + 2 * m + cols, mask=col_in, other=0.0)
        if DEPTH == CHUNK:
            # The columns are read once and serve both matmuls.
            other = _load(u, cols, col_in, 0, D, CHUNK, UPCAST)
            s = tl.dot(own, tl.trans(other), input_precision=PRECISION)
        else:
            other = _load(u, cols, col_in, tl.program_id(2) * WIDTH, D, WIDTH, UPCAST)
            s = _dots(u, rows, cols, row_in, col_in, D, CHUNK, DEPTH, PRECISION, UPCAST, ROWS, COLS)
        # Columns beyond m need no mask: their u_j is zero.
        e = tl.exp(s)
        g = e * (n_i[:, None] + n_j[None, :])
        if (tl.min(tl.where(col_in, col_ids, 2147483647)) <= high) & (tl.max(col_ids) >= low):
            c_j = tl.load(coefficients + cols, mask=col_in, other=0.0)
            p_j = tl.load(coefficients + m + cols, mask=col_in, other=0.0)
            pull = e * (p_i[:, None] + p_j[None, :]) + (c_i[:, None] + c_j[None, :])
            if INVERSE:
                f_j = tl.load(coefficients + 3 * m + cols, mask=col_in, other=0.0)
                pull -= kappa * (f_i[:, None] + f_j[None, :]) * tl.exp(-kappa * s)
            g = tl.where(row_ids[:, None] == col_ids[None, :], pull, g)
            g = tl.where(rows[:, None] == cols[None, :], 0.0, g)
        g = g.to(u.dtype.element_ty).to(other.dtype)
        grad = tl.dot(g, other, grad, input_precision=PRECISION)
    base = out + (split.to(tl.int64) * n + local[:, None]) * D + d[None, :]
    tl.store(base, grad, mask=row_in[:, None] & (d < D)[None, :])


class Triton:
    """The Triton backend with tiles of `precision` "bf16", "tf32" or "ieee" (fp32) and fp32 accumulation."""

    def __init__(self, precision: str) -> None:
        # bf16 operands know no other precision; tl.dot wants a valid name for them all the same.
        self._bf16 = precision == "bf16"
        self._precision = "ieee" if self._bf16 or _INTERPRETED else precision

    def row_sums(self, columns: Columns, kappa: float | None) -> RowSums:
        u, launch = self._launch(columns, kappa)
        out = torch.empty(launch["splits"], 5, launch["n"], dtype=torch.float32, device=u.device)
        if launch["n"]:
            _sums_kernel[_grid(launch, 1)](u, launch["ids"], out, *launch["sizes"], **launch["constants"])
        s_pos, exp_pos, exp_neg, inv, s_inv = out.sum(0)
        return RowSums(s_pos, exp_pos, exp_neg, None if kappa is None else inv, None if kappa is None else s_inv)

    def row_gradients(self, columns: Columns, coefficients: Tensor, kappa: float | None) -> Tensor:
        u, launch = self._launch(columns, kappa)
        d = u.shape[1]
        width = max(16, triton.next_power_of_2(min(d, _WIDEST_GRADIENT)))
        out = torch.empty(launch["splits"], launch["n"], d, dtype=torch.float32, device=u.device)
        if launch["n"]:
            _gradient_kernel[_grid(launch, triton.cdiv(d, width))](
                u,
                launch["ids"],
                coefficients.float().T.contiguous(),
                out,
                *launch["sizes"],
                WIDTH=width,
                **launch["constants"],
            )
        return out[0] if len(out) == 1 else out.sum(0)

    def _launch(self, columns: Columns, kappa: float | None) -> tuple[Tensor, dict[str, Any]]:
        """u in the tiles' dtype, and what both kernels are launched with."""
        u = columns.u.to(torch.bfloat16 if self._bf16 else torch.float32).contiguous()
        m, d = u.shape
        n = columns.own.stop - columns.own.start
        splits = _splits(n, u)
        # A split begins at a multiple of the widest tile, so that tiles never straddle two splits.
        span = triton.cdiv(triton.cdiv(m, splits), 256) * 256
        splits = max(1, triton.cdiv(m, span)) if span else 1
        depth = max(16, triton.next_power_of_2(d))
        sizes = (columns.own.start, n, m, d, 0.0 if kappa is None else kappa, span, triton.next_power_of_2(max(m, 1)))
        constants = {
            "CHUNK": self._chunk(depth),
            "DEPTH": depth,
            "INVERSE": kappa is not None,
            "PRECISION": self._precision,
            # The interpreter's dot multiplies the bit patterns of bf16; products of bf16 are exact in fp32.
            "UPCAST": _INTERPRETED and self._bf16,
            "enable_fp_fusion": True,
        }
        return u, {"n": n, "ids": columns.ids.int(), "splits": splits, "sizes": sizes, "constants": constants}

    def _chunk(self, depth: int) -> int:
        """Features per matmul step: all where a block of rows fits shared memory, and is then loaded once."""
        if _INTERPRETED:
            return min(depth, 64)
        bytes_per = 2 if self._bf16 else 4
        return depth if depth * bytes_per <= 512 else 128 // bytes_per


def _splits(n: int, u: Tensor) -> int:
    """Column splits: enough programs for two waves where the rows alone do not fill the device."""
    if _INTERPRETED:
        return 2
    processors = torch.cuda.get_device_properties(u.device).multi_processor_count
    return max(1, min(16, 2 * processors // max(1, triton.cdiv(n, 128))))


def _grid(launch: dict[str, Any], outer: int) -> Any:
    return lambda config: (triton.cdiv(launch["n"], config["ROWS"]), launch["splits"], outer)
