"""The Triton kernels of the losses over all pairs: the row sums, the gradient. TritonBackend launches them.

Columns are sorted by class, so the columns of a row's class are one range, and the tiles that hold a positive pair of
a block of rows are one range too. Those, and a last tile that is not whole, are walked in a loop of their own: the
loop over all other tiles compares no classes, masks nothing and has no branch. The operands are scaled so that their
products are s / ln 2: 2 to that power, which is one instruction, is exp(s).

Nothing here depends on the order in which programs run, and no tile is written to the device's memory.
"""

# Triton reads the annotations of a kernel: its parameters cannot carry Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import math

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
_ON_DEVICE = tl.constexpr(not INTERPRETED)
LOG2_E = 1 / math.log(2)
_LN_2 = tl.constexpr(math.log(2))
_SQRT_LN_2 = tl.constexpr(math.sqrt(math.log(2)))


@triton.jit
def _exp2(x):
    """2 ** x. tl.exp2 guards against denormal results with three more instructions; here they are 0."""
    if _ON_DEVICE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505 - a constexpr branch
        return tl.exp2(x)


@triton.jit
def arrange_kernel(u, order, out, m, D, DEPTH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """out [m, DEPTH] = u[order] [m, D], zero beyond D."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    source = tl.load(order + rows, mask=rows < m, other=0).to(tl.int64)
    inside = (rows < m)[:, None]
    x = tl.load(u + source[:, None] * D + d[None, :], mask=inside & (d < D)[None, :], other=0.0)
    tl.store(out + rows[:, None].to(tl.int64) * DEPTH + d[None, :], x, mask=inside)


@triton.jit
def _own_rows(n, ROWS: tl.constexpr):
    """(index, own) [ROWS]: the program's rows; those beyond n, which are not stored, are the last one in `own`."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return index, tl.minimum(index, n - 1)


@triton.jit
def _tile_range(bounds, n, m, span, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(begin, low, high, full, stop): the split's whole tiles are begin .. full, and the columns go on up to `stop`.

    Positive pairs of the rows are in the tiles low .. high, or in the columns beyond the whole tiles. bounds: see
    sums_kernel.
    """
    first_row, start = tl.program_id(0) * ROWS, tl.program_id(1) * span
    stop = tl.minimum(start + span, m)
    begin, full = start // COLS, stop // COLS
    low = tl.load(bounds + first_row) // COLS
    high = tl.cdiv(tl.load(bounds + n + tl.minimum(first_row + ROWS, n) - 1), COLS)
    low = tl.minimum(tl.maximum(low, begin), full)
    high = tl.minimum(tl.maximum(high, low), full)
    return begin, low, high, full, stop


@triton.jit
def _careful_steps(low, high, full, stop, COLS: tl.constexpr, STEP: tl.constexpr):
    """Number of steps of STEP columns that cover the tiles low .. high, and the columns beyond the whole tiles."""
    return (high - low) * (COLS // STEP) + tl.cdiv(stop - full * COLS, STEP)


@triton.jit
def _careful_columns(k, low, high, full, m, COLS: tl.constexpr, STEP: tl.constexpr):
    """(the columns of the k-th of these steps, whether they are below m), [STEP]."""
    in_tiles = (high - low) * (COLS // STEP)
    first = tl.where(k < in_tiles, low * COLS + k * STEP, full * COLS + (k - in_tiles) * STEP)
    cols = first + tl.arange(0, STEP)
    return cols, cols < m


@triton.jit
def _whole_block(u, first, start, DEPTH: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """u[first : first + COLS, start : start + WIDTH]."""
    offsets = tl.arange(0, COLS)[:, None] * DEPTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(u + (first.to(tl.int64) * DEPTH + start) + offsets)


@triton.jit
def _block(u, rows, inside, start, DEPTH: tl.constexpr, WIDTH: tl.constexpr):
    """u[rows, start : start + WIDTH], zero where not inside."""
    d = start + tl.arange(0, WIDTH)
    return tl.load(u + rows[:, None].to(tl.int64) * DEPTH + d[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _rows(own_u, own, start, DEPTH: tl.constexpr, CHUNK: tl.constexpr):
    """own_u[own, start : start + CHUNK]."""
    return tl.load(own_u + own[:, None].to(tl.int64) * DEPTH + (start + tl.arange(0, CHUNK))[None, :])


@triton.jit
def _products(
    u_rows, own_u, own, u, first, CHUNK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """s / ln 2 of the rows and COLS columns from `first` on, [ROWS, COLS] fp32; u_rows is their first chunk."""
    if DEPTH == CHUNK:
        return tl.dot(u_rows, tl.trans(_whole_block(u, first, 0, DEPTH, CHUNK, COLS)), input_precision=PRECISION)
    else:  # noqa: RET505 - a constexpr branch
        s = tl.zeros([ROWS, COLS], tl.float32)
        for start in range(0, DEPTH, CHUNK):
            b = _whole_block(u, first, start, DEPTH, CHUNK, COLS)
            s = tl.dot(_rows(own_u, own, start, DEPTH, CHUNK), tl.trans(b), s, input_precision=PRECISION)
        return s


@triton.jit
def _careful_products(
    u_rows, own_u, own, u, cols, inside, CHUNK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The same for columns of which some may be beyond the last."""
    if DEPTH == CHUNK:
        return tl.dot(u_rows, tl.trans(_block(u, cols, inside, 0, DEPTH, CHUNK)), input_precision=PRECISION)
    else:  # noqa: RET505 - a constexpr branch
        s = tl.zeros([ROWS, STEP], tl.float32)
        for start in range(0, DEPTH, CHUNK):
            b = _block(u, cols, inside, start, DEPTH, CHUNK)
            s = tl.dot(_rows(own_u, own, start, DEPTH, CHUNK), tl.trans(b), s, input_precision=PRECISION)
        return s


@triton.jit
def sums_kernel(
    own_u, u, bounds, out, n, m, temperature, span, M_BUCKET,
    CHUNK: tl.constexpr, DEPTH: tl.constexpr, INVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out [splits, 5, n] fp32: sim_pos, exp_pos, exp_neg, inv_pos, sim_inv_pos of RowSums.

    own_u [n, DEPTH] and u [m, DEPTH] are rows and columns, both sorted by class. bounds [3, n]: the range of columns
    of the row's class (first, stop), and the column that is the row itself. Split k sums over the columns k * span ..
    (k + 1) * span. temperature: a pointer to tau, read with INVERSE alone. CHUNK: feature dimensions of one product.
    STEP: columns of one round of the loop for positives.
    M_BUCKET: m, rounded up so that the kernel is not tuned anew for every m.
    """
    index, own = _own_rows(n, ROWS)
    begin, low, high, full, end = _tile_range(bounds, n, m, span, ROWS, COLS)
    u_rows = _rows(own_u, own, 0, DEPTH, CHUNK)
    exp_neg = tl.zeros([ROWS], tl.float32)
    for k in range(begin, full - (high - low)):
        tile = k + tl.where(k < low, 0, high - low)
        s = _products(u_rows, own_u, own, u, tile * COLS, CHUNK, DEPTH, PRECISION, ROWS, COLS)
        exp_neg += tl.sum(_exp2(s), 1)

    first, stop = tl.load(bounds + own), tl.load(bounds + n + own)
    itself = tl.load(bounds + 2 * n + own)
    sim_pos = tl.zeros([ROWS], tl.float32)
    exp_pos = tl.zeros([ROWS], tl.float32)
    inv_pos = tl.zeros([ROWS], tl.float32)
    sim_inv_pos = tl.zeros([ROWS], tl.float32)
    for k in tl.range(0, _careful_steps(low, high, full, end, COLS, STEP), num_stages=1):
        cols, inside = _careful_columns(k, low, high, full, m, COLS, STEP)
        s = _careful_products(u_rows, own_u, own, u, cols, inside, CHUNK, DEPTH, PRECISION, ROWS, STEP)
        same = (cols[None, :] >= first[:, None]) & (cols[None, :] < stop[:, None])
        positive = same & (cols[None, :] != itself[:, None])
        exp_s = _exp2(s)
        sim_pos += tl.sum(tl.where(positive, s, 0.0), 1)
        exp_pos += tl.sum(tl.where(positive, exp_s, 0.0), 1)
        exp_neg += tl.sum(tl.where(same | ~inside[None, :], 0.0, exp_s), 1)
        if INVERSE:
            inverse = tl.where(positive, _exp2(-tl.load(temperature).to(tl.float32) * s), 0.0)
            inv_pos += tl.sum(inverse, 1)
            sim_inv_pos += tl.sum(inverse * s, 1)
    base = out + tl.program_id(1) * 5 * n + index
    tl.store(base, sim_pos * _LN_2, mask=index < n)
    tl.store(base + n, exp_pos, mask=index < n)
    tl.store(base + 2 * n, exp_neg, mask=index < n)
    tl.store(base + 3 * n, inv_pos, mask=index < n)
    tl.store(base + 4 * n, sim_inv_pos * _LN_2, mask=index < n)


@triton.jit
def _negative_gradients(s, neg_i, start, weights, m, BF16: tl.constexpr, COLS: tl.constexpr):
    """G_ij + G_ji of a tile without positive pairs, whose columns begin at `start`."""
    neg_j = tl.load(weights + 2 * m + start + tl.arange(0, COLS))
    gradients = _exp2(s) * (neg_i[:, None] + neg_j[None, :])
    if BF16:
        gradients = gradients.to(tl.bfloat16)
    return gradients


@triton.jit
def _gradients(
    s, neg_i, own, itself, cols, inside, bounds, weights, n, m, temperature, INVERSE: tl.constexpr, BF16: tl.constexpr
):
    """G_ij + G_ji of any columns; those beyond m receive numbers without meaning."""
    exp_s = _exp2(s)
    neg_j = tl.load(weights + 2 * m + cols, mask=inside, other=0.0)
    pos_i, pos_j = tl.load(weights + m + itself), tl.load(weights + m + cols, mask=inside, other=0.0)
    sim_i, sim_j = tl.load(weights + itself), tl.load(weights + cols, mask=inside, other=0.0)
    of_positives = exp_s * (pos_i[:, None] + pos_j[None, :]) + (sim_i[:, None] + sim_j[None, :])
    if INVERSE:
        inv_i, inv_j = tl.load(weights + 3 * m + itself), tl.load(weights + 3 * m + cols, mask=inside, other=0.0)
        tau = tl.load(temperature).to(tl.float32)
        of_positives -= tau * (inv_i[:, None] + inv_j[None, :]) * _exp2(-tau * s)
    first, stop = tl.load(bounds + own), tl.load(bounds + n + own)
    same = (cols[None, :] >= first[:, None]) & (cols[None, :] < stop[:, None])
    gradients = tl.where(same, of_positives, exp_s * (neg_i[:, None] + neg_j[None, :]))
    gradients = tl.where(cols[None, :] == itself[:, None], 0.0, gradients)
    if BF16:
        gradients = gradients.to(tl.bfloat16)
    return gradients


@triton.jit
def gradient_kernel(
    own_u, u, bounds, weights, out, n, m, temperature, span, M_BUCKET,
    CHUNK: tl.constexpr, DEPTH: tl.constexpr, INVERSE: tl.constexpr, PRECISION: tl.constexpr, BF16: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out [splits, n, DEPTH] fp32: the sum over the split's columns j of (G_ij + G_ji) u_j.

    weights [4, m] fp32 of the columns: sim_weight, pos_weight, neg_weight, inv_weight; the other arguments as in
    sums_kernel, CHUNK = DEPTH. BF16: products are of bf16.
    """
    index, own = _own_rows(n, ROWS)
    begin, low, high, full, end = _tile_range(bounds, n, m, span, ROWS, COLS)
    u_rows = _rows(own_u, own, 0, DEPTH, DEPTH)
    itself = tl.load(bounds + 2 * n + own)
    neg_i = tl.load(weights + 2 * m + itself)
    grad = tl.zeros([ROWS, DEPTH], tl.float32)
    for k in range(begin, full - (high - low)):
        start = (k + tl.where(k < low, 0, high - low)) * COLS
        u_cols = _whole_block(u, start, 0, DEPTH, DEPTH, COLS)
        s = tl.dot(u_rows, tl.trans(u_cols), input_precision=PRECISION)
        grad_s = _negative_gradients(s, neg_i, start, weights, m, BF16, COLS)
        grad = tl.dot(grad_s.to(u_cols.dtype), u_cols, grad, input_precision=PRECISION)
    for k in tl.range(0, _careful_steps(low, high, full, end, COLS, STEP), num_stages=1):
        cols, inside = _careful_columns(k, low, high, full, m, COLS, STEP)
        u_cols = _block(u, cols, inside, 0, DEPTH, DEPTH)  # zero beyond m
        s = tl.dot(u_rows, tl.trans(u_cols), input_precision=PRECISION)
        grad_s = _gradients(s, neg_i, own, itself, cols, inside, bounds, weights, n, m, temperature, INVERSE, BF16)
        grad = tl.dot(grad_s.to(u_cols.dtype), u_cols, grad, input_precision=PRECISION)
    base = out + (tl.program_id(1).to(tl.int64) * n + index[:, None]) * DEPTH + tl.arange(0, DEPTH)[None, :]
    tl.store(base, grad * _SQRT_LN_2, mask=(index < n)[:, None])


@triton.jit
def pair_gradient_kernel(
    own_u, u, bounds, weights, out, n, m, temperature, span, M_BUCKET, stride,
    CHUNK: tl.constexpr, DEPTH: tl.constexpr, INVERSE: tl.constexpr, PRECISION: tl.constexpr, BF16: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out [n, stride] = G_ij + G_ji in the dtype of the products, for the split's columns; arguments as above."""
    _, own = _own_rows(n, ROWS)
    begin, low, high, full, end = _tile_range(bounds, n, m, span, ROWS, COLS)
    u_rows = _rows(own_u, own, 0, DEPTH, CHUNK)
    itself = tl.load(bounds + 2 * n + own)
    neg_i = tl.load(weights + 2 * m + itself)
    to_rows = out + own[:, None].to(tl.int64) * stride
    for k in range(begin, full - (high - low)):
        start = (k + tl.where(k < low, 0, high - low)) * COLS
        s = _products(u_rows, own_u, own, u, start, CHUNK, DEPTH, PRECISION, ROWS, COLS)
        grad_s = _negative_gradients(s, neg_i, start, weights, m, BF16, COLS)
        tl.store(to_rows + (start + tl.arange(0, COLS))[None, :], grad_s.to(out.dtype.element_ty))
    for k in tl.range(0, _careful_steps(low, high, full, end, COLS, STEP), num_stages=1):
        cols, inside = _careful_columns(k, low, high, full, m, COLS, STEP)
        s = _careful_products(u_rows, own_u, own, u, cols, inside, CHUNK, DEPTH, PRECISION, ROWS, STEP)
        grad_s = _gradients(s, neg_i, own, itself, cols, inside, bounds, weights, n, m, temperature, INVERSE, BF16)
        tl.store(to_rows + cols[None, :], grad_s.to(out.dtype.element_ty), mask=inside[None, :])
