"""Sizes of the Triton kernels' work: tiles, column splits, strips, and the dimensions that one product takes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton

from .triton_kernels import INTERPRETED, gradient_kernel

# A split begins at a multiple of the widest tile, so that no tile belongs to two splits.
_WIDEST_TILE = 256
_MOST_SPLITS = 16
# Memory for the partial results of column splits, and for a strip of G.
_SCRATCH_BYTES = 64 << 20
# Columns whose time a program needs to load its rows, fill its pipeline and write its results, about.
_START_COLUMNS = 128
# Columns of one round of the loop for positive pairs: few, since it has more numbers per pair to hold in registers.
_STEP = 32
# Accumulators per thread above which a kernel spills registers.
_MOST_ACCUMULATORS = 160


def operand_depth(d: int) -> int:
    """D rounded up to what the kernels compute: a power of two, above 256 a multiple of 128."""
    return max(16, triton.next_power_of_2(d)) if d <= 256 else triton.cdiv(d, 128) * 128


def operand_chunk(depth: int, itemsize: int) -> int:
    """Feature dimensions per product: all where a block of rows fits in shared memory, to load it only once."""
    return depth if depth * itemsize <= 512 else 256 // itemsize


def column_span(n: int, m: int, device: torch.device, output_bytes: int = 0) -> int:
    """Columns of one split, of n rows and m columns; `output_bytes`: the memory that the results of a split take."""
    most = _MOST_SPLITS if not output_bytes else max(1, min(_MOST_SPLITS, _SCRATCH_BYTES // output_bytes))
    if INTERPRETED:
        return _span(m, min(2, most))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _span(m, column_splits(triton.cdiv(n, 128), m, processors, most))


def column_splits(row_blocks: int, m: int, processors: int, most: int = _MOST_SPLITS) -> int:
    """The number of splits, up to `most`, with which `processors` are done first."""

    def columns_in_turn(splits: int) -> int:
        span = _span(m, splits)
        waves = triton.cdiv(row_blocks * triton.cdiv(m, span), processors)
        return int(waves * (span + _START_COLUMNS))

    return min(range(1, most + 1), key=columns_in_turn)


def _span(m: int, splits: int) -> int:
    return max(1, triton.cdiv(triton.cdiv(m, splits), _WIDEST_TILE)) * _WIDEST_TILE


def strip_rows(m: int, itemsize: int) -> int:
    """Rows of one strip of G, of m columns: a multiple of the tile's."""
    return max(1, _SCRATCH_BYTES // (max(m, 1) * itemsize * 128)) * 128


def configurations(depth: int, itemsize: int, shared_bytes: int, *, accumulates: bool) -> list[Any]:
    """Tiles, warps and stages that fit into a device's shared memory and, where the kernel `accumulates` a gradient,
    into its registers. The first is taken where a run must repeat its bits; otherwise they are timed."""
    chunk = operand_chunk(depth, itemsize)
    shapes = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 128, 4, 2)]
    shapes += [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)]
    found = []
    for rows, cols, warps, stages in shapes:
        operands = (rows * (1 if chunk == depth else stages) + cols * stages) * chunk * itemsize
        accumulators = rows * ((depth if accumulates else 0) + cols * itemsize // 2) / (32 * warps)
        if operands + 2048 <= shared_bytes and accumulators <= _MOST_ACCUMULATORS:
            tile = {"ROWS": rows, "COLS": cols, "STEP": min(cols, _STEP)}
            found.append(triton.Config(tile, num_warps=warps, num_stages=stages))
    return found


def launch_kernel(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], itemsize: int) -> None:
    """On blocks of rows x column splits, in the fastest configuration, or in a fixed one.

    `arguments` are those of sums_kernel or a kernel like it; `itemsize`: bytes of the products' operands.
    """
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    n, m, span, device = named["n"], named["m"], named["span"], named["u"].device

    def grid(tile: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(n, tile["ROWS"]), triton.cdiv(m, span)

    if INTERPRETED:
        # Small tiles, so that the small batches of the tests have several in each direction.
        rows, cols = (16, 32) if m <= 256 else (128, 128)
        kernel[grid](*arguments, **constants, ROWS=rows, COLS=cols, STEP=min(cols, _STEP))
        return
    shared_bytes = _shared_bytes(device.index)
    found, tuned = _choices(kernel, constants["DEPTH"], itemsize, shared_bytes)
    if torch.are_deterministic_algorithms_enabled():
        kernel[grid](*arguments, **constants, **found[0].all_kwargs())
    else:
        tuned[grid](*arguments, **constants)


@cache
def _shared_bytes(device: int) -> int:
    """Shared memory that one block may have."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


@cache
def _choices(kernel: Any, depth: int, itemsize: int, shared_bytes: int) -> tuple[list[Any], Any]:
    """The configurations, and the kernel in the one that was the fastest for sizes like these, timed once."""
    found = configurations(depth, itemsize, shared_bytes, accumulates=kernel is gradient_kernel)
    return found, triton.autotune(configs=found, key=["M_BUCKET", "INVERSE", "PRECISION"])(kernel)
