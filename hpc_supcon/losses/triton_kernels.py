"""The Triton backend (loss.backend=triton): one kernel for the row sums, one for the gradient.

Imported only when it is used. A program computes a block of rows of the similarity matrix in a loop over its columns;
no tile is written to the device's memory, and both kernels compute s from u. Results do not depend on the order of
execution: there are no atomics, and the partial results of column splits are added in a fixed order. Needs compute
capability 8.0 or later; with TRITON_INTERPRET=1 it runs on the CPU. The equations are in autograd.py.
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
from .gathered import GatheredRows

_INTERPRETED = bool(triton.knobs.runtime.interpret)
# Feature dimensions that one program of the gradient kernel computes at most: a wider accumulator leaves no registers
# for the tile.
_WIDEST_GRADIENT = 256


def _configs() -> list[Any]:
    if _INTERPRETED:
        # Small tiles, so that the batches of the tests have several in each direction.
        return [triton.Config({"ROWS": 16, "COLS": 32}, num_warps=4, num_stages=1)]
    # Triton times them once per size and dtype on the device in use, and skips those that exceed its shared memory.
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
def _dot_products(
    u, rows, cols, row_in, col_in, D, CHUNK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """u[rows] @ u[cols].T, which is s: [ROWS, COLS] fp32, accumulated over chunks of the feature dimensions."""
    s = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, DEPTH, CHUNK):
        a = _load(u, rows, row_in, start, D, CHUNK, UPCAST)
        b = _load(u, cols, col_in, start, D, CHUNK, UPCAST)
        s = tl.dot(a, tl.trans(b), s, input_precision=PRECISION)
    return s


@triton.autotune(configs=_configs(), key=["M_BUCKET", "D", "INVERSE", "PRECISION", "UPCAST"])
@triton.jit
def _sums_kernel(
    u, class_ids, out, first_row, n, m, D, temperature, span, M_BUCKET,
    CHUNK: tl.constexpr, DEPTH: tl.constexpr, INVERSE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out [splits, 5, n] fp32: sim_pos, exp_pos, exp_neg, inv_pos, sim_inv_pos of RowSums.

    u [m, D] are all rows, of which n from `first_row` on are this rank's. Split k sums over the columns
    k * span .. (k + 1) * span. CHUNK: feature dimensions of one product; DEPTH: D, rounded up to a power of two;
    M_BUCKET: m, rounded up so that the kernel is not tuned anew for every m.
    """
    own_index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    row_in = own_index < n
    rows = first_row + own_index
    row_ids = tl.load(class_ids + rows, mask=row_in, other=-1)
    low, high = tl.min(tl.where(row_in, row_ids, 2147483647)), tl.max(row_ids)
    u_rows = _load(u, rows, row_in, 0, D, CHUNK, UPCAST)
    sim_pos = tl.zeros([ROWS], tl.float32)
    exp_pos = tl.zeros([ROWS], tl.float32)
    exp_neg = tl.zeros([ROWS], tl.float32)
    inv_pos = tl.zeros([ROWS], tl.float32)
    sim_inv_pos = tl.zeros([ROWS], tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, m), COLS):
        cols = start + tl.arange(0, COLS)
        col_in = cols < m
        col_ids = tl.load(class_ids + cols, mask=col_in, other=-2)
        if DEPTH == CHUNK:
            u_cols = _load(u, cols, col_in, 0, D, CHUNK, UPCAST)
            s = tl.dot(u_rows, tl.trans(u_cols), input_precision=PRECISION)
        else:
            s = _dot_products(u, rows, cols, row_in, col_in, D, CHUNK, DEPTH, PRECISION, UPCAST, ROWS, COLS)
        exp_s = tl.where(col_in[None, :], tl.exp(s), 0.0)
        # Rows and columns are sorted by class: most tiles hold no positive pair at all.
        if (tl.min(tl.where(col_in, col_ids, 2147483647)) <= high) & (tl.max(col_ids) >= low):
            same = row_ids[:, None] == col_ids[None, :]
            positive = same & (rows[:, None] != cols[None, :])
            sim_pos += tl.sum(tl.where(positive, s, 0.0), 1)
            exp_pos += tl.sum(tl.where(positive, exp_s, 0.0), 1)
            exp_neg += tl.sum(tl.where(same, 0.0, exp_s), 1)
            if INVERSE:
                inverse = tl.where(positive, tl.exp(-temperature * s), 0.0)
                inv_pos += tl.sum(inverse, 1)
                sim_inv_pos += tl.sum(inverse * s, 1)
        else:
            exp_neg += tl.sum(exp_s, 1)
    base = out + split * 5 * n + own_index
    tl.store(base, sim_pos, mask=row_in)
    tl.store(base + n, exp_pos, mask=row_in)
    tl.store(base + 2 * n, exp_neg, mask=row_in)
    tl.store(base + 3 * n, inv_pos, mask=row_in)
    tl.store(base + 4 * n, sim_inv_pos, mask=row_in)


@triton.autotune(configs=_configs(), key=["M_BUCKET", "D", "INVERSE", "PRECISION", "UPCAST"])
@triton.jit
def _gradient_kernel(
    u, class_ids, row_weights, out, first_row, n, m, D, temperature, span, M_BUCKET,
    CHUNK: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, INVERSE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out [splits, n, D] fp32: the sum over the split's columns j of (G_ij + G_ji) u_j.

    row_weights [4, m] fp32: sim_weight, pos_weight, neg_weight, inv_weight; the other arguments as in _sums_kernel.
    A program computes WIDTH of the D feature dimensions.
    """
    own_index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    d = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    row_in = own_index < n
    rows = first_row + own_index
    row_ids = tl.load(class_ids + rows, mask=row_in, other=-1)
    low, high = tl.min(tl.where(row_in, row_ids, 2147483647)), tl.max(row_ids)
    sim_weight_i = tl.load(row_weights + rows, mask=row_in, other=0.0)
    pos_weight_i = tl.load(row_weights + m + rows, mask=row_in, other=0.0)
    neg_weight_i = tl.load(row_weights + 2 * m + rows, mask=row_in, other=0.0)
    inv_weight_i = tl.load(row_weights + 3 * m + rows, mask=row_in, other=0.0)
    u_rows = _load(u, rows, row_in, 0, D, CHUNK, UPCAST)
    grad = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, m), COLS):
        cols = start + tl.arange(0, COLS)
        col_in = cols < m
        col_ids = tl.load(class_ids + cols, mask=col_in, other=-2)
        neg_weight_j = tl.load(row_weights + 2 * m + cols, mask=col_in, other=0.0)
        if DEPTH == CHUNK:
            # The columns' rows of u are loaded once for both products.
            u_cols = _load(u, cols, col_in, 0, D, CHUNK, UPCAST)
            s = tl.dot(u_rows, tl.trans(u_cols), input_precision=PRECISION)
        else:
            u_cols = _load(u, cols, col_in, tl.program_id(2) * WIDTH, D, WIDTH, UPCAST)
            s = _dot_products(u, rows, cols, row_in, col_in, D, CHUNK, DEPTH, PRECISION, UPCAST, ROWS, COLS)
        # Columns beyond m need no mask: their u_j are zero.
        exp_s = tl.exp(s)
        grad_s = exp_s * (neg_weight_i[:, None] + neg_weight_j[None, :])
        if (tl.min(tl.where(col_in, col_ids, 2147483647)) <= high) & (tl.max(col_ids) >= low):
            sim_weight_j = tl.load(row_weights + cols, mask=col_in, other=0.0)
            pos_weight_j = tl.load(row_weights + m + cols, mask=col_in, other=0.0)
            grad_pos = exp_s * (pos_weight_i[:, None] + pos_weight_j[None, :])
            grad_pos = grad_pos + (sim_weight_i[:, None] + sim_weight_j[None, :])
            if INVERSE:
                inv_weight_j = tl.load(row_weights + 3 * m + cols, mask=col_in, other=0.0)
                inv_weight = inv_weight_i[:, None] + inv_weight_j[None, :]
                grad_pos -= temperature * inv_weight * tl.exp(-temperature * s)
            grad_s = tl.where(row_ids[:, None] == col_ids[None, :], grad_pos, grad_s)
            grad_s = tl.where(rows[:, None] == cols[None, :], 0.0, grad_s)
        grad_s = grad_s.to(u.dtype.element_ty).to(u_cols.dtype)
        grad = tl.dot(grad_s, u_cols, grad, input_precision=PRECISION)
    base = out + (split.to(tl.int64) * n + own_index[:, None]) * D + d[None, :]
    tl.store(base, grad, mask=row_in[:, None] & (d < D)[None, :])


class TritonBackend:
    """The TiledBackend of Triton kernels: products in `precision` "bf16", "tf32" or "ieee" (fp32), sums in fp32."""

    def __init__(self, precision: str) -> None:
        # tl.dot ignores the precision for bf16 operands, but requires a valid name.
        self._bf16 = precision == "bf16"
        self._precision = "ieee" if self._bf16 or _INTERPRETED else precision

    def row_sums(self, gathered: GatheredRows, temperature: float | None) -> RowSums:
        u, launch = self._launch(gathered, temperature)
        out = torch.empty(launch["splits"], 5, launch["n"], dtype=torch.float32, device=u.device)
        if launch["n"]:
            _sums_kernel[_grid(launch, 1)](u, launch["class_ids"], out, *launch["sizes"], **launch["constants"])
        sim_pos, exp_pos, exp_neg, inv_pos, sim_inv_pos = out.sum(0)
        if temperature is None:
            return RowSums(sim_pos, exp_pos, exp_neg, None, None)
        return RowSums(sim_pos, exp_pos, exp_neg, inv_pos, sim_inv_pos)

    def row_gradients(self, gathered: GatheredRows, weights_M4: Tensor, temperature: float | None) -> Tensor:
        u, launch = self._launch(gathered, temperature)
        d = u.shape[1]
        width = max(16, triton.next_power_of_2(min(d, _WIDEST_GRADIENT)))
        out = torch.empty(launch["splits"], launch["n"], d, dtype=torch.float32, device=u.device)
        if launch["n"]:
            _gradient_kernel[_grid(launch, triton.cdiv(d, width))](
                u,
                launch["class_ids"],
                weights_M4.float().T.contiguous(),
                out,
                *launch["sizes"],
                WIDTH=width,
                **launch["constants"],
            )
        return out[0] if len(out) == 1 else out.sum(0)

    def _launch(self, gathered: GatheredRows, temperature: float | None) -> tuple[Tensor, dict[str, Any]]:
        """u in the dtype of the products, and the arguments that both kernels are launched with."""
        u = gathered.u.to(torch.bfloat16 if self._bf16 else torch.float32).contiguous()
        m, d = u.shape
        n = gathered.own.stop - gathered.own.start
        splits = _splits(n, u)
        # A split begins at a multiple of the widest tile, so that no tile belongs to two splits.
        span = triton.cdiv(triton.cdiv(m, splits), 256) * 256
        splits = max(1, triton.cdiv(m, span)) if span else 1
        depth = max(16, triton.next_power_of_2(d))
        bucket = triton.next_power_of_2(max(m, 1))
        sizes = (gathered.own.start, n, m, d, 0.0 if temperature is None else temperature, span, bucket)
        constants = {
            "CHUNK": self._chunk(depth),
            "DEPTH": depth,
            "INVERSE": temperature is not None,
            "PRECISION": self._precision,
            # The interpreter's tl.dot would multiply the bit patterns of bf16; products of bf16 are exact in fp32.
            "UPCAST": _INTERPRETED and self._bf16,
            "enable_fp_fusion": True,
        }
        class_ids = gathered.class_ids.int()
        return u, {"n": n, "class_ids": class_ids, "splits": splits, "sizes": sizes, "constants": constants}

    def _chunk(self, depth: int) -> int:
        """Feature dimensions per product: all where a block of rows fits in shared memory, to load it only once."""
        if _INTERPRETED:
            return min(depth, 64)
        bytes_per = 2 if self._bf16 else 4
        return depth if depth * bytes_per <= 512 else 128 // bytes_per


def _splits(n: int, u: Tensor) -> int:
    """Number of column splits: enough for two waves of programs where the blocks of rows do not fill the device."""
    if _INTERPRETED:
        return 2
    processors = torch.cuda.get_device_properties(u.device).multi_processor_count
    return max(1, min(16, 2 * processors // max(1, triton.cdiv(n, 128))))


def _grid(launch: dict[str, Any], outer: int) -> Any:
    """Row blocks x column splits x `outer`."""
    return lambda config: (triton.cdiv(launch["n"], config["ROWS"]), launch["splits"], outer)
