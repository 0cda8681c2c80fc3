"""Sizes of the Triton kernels' work: tiles, column splits, strips, and the dimensions that one product takes."""

from __future__ import annotations

from functools import cache, lru_cache
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


def ceil_div(a: int, b: int) -> int:
    """triton.cdiv and triton.next_power_of_2 are for kernels: on the host each call costs microseconds."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def operand_depth(d: int) -> int:
    """D rounded up to what the kernels compute: a power of two, above 256 a multiple of 128."""
    return max(16, power_of_2(d)) if d <= 256 else ceil_div(d, 128) * 128


def operand_chunk(depth: int, itemsize: int) -> int:
    """Feature dimensions per product: all where a block of rows fits in shared memory, to load it only once."""
    return depth if depth * itemsize <= 512 else 256 // itemsize


@lru_cache(maxsize=256)
def column_span(n: int, m: int, device: torch.device, output_bytes: int = 0) -> int:
    """Columns of one split, of n rows and m columns; `output_bytes`: the memory that the results of a split take."""
    most = _MOST_SPLITS if not output_bytes else max(1, min(_MOST_SPLITS, _SCRATCH_BYTES // output_bytes))
    if INTERPRETED:
        return _span(m, min(2, most))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _span(m, column_splits(ceil_div(n, 128), m, processors, most))


def column_splits(row_blocks: int, m: int, processors: int, most: int = _MOST_SPLITS) -> int:
    """The number of splits, up to `most`, with which `processors` are done first."""

    def columns_in_turn(splits: int) -> int:
        span = _span(m, splits)
        waves = ceil_div(row_blocks * ceil_div(m, span), processors)
        return int(waves * (span + _START_COLUMNS))

    return min(range(1, most + 1), key=columns_in_turn)


def _span(m: int, splits: int) -> int:
    return max(1, ceil_div(ceil_div(m, splits), _WIDEST_TILE)) * _WIDEST_TILE


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
    n, m, span = named["n"], named["m"], named["span"]

    def grid(tile: dict[str, Any]) -> tuple[int, int]:
        return ceil_div(n, tile["ROWS"]), ceil_div(m, span)

    if INTERPRETED:
        # Small tiles, so that the small batches of the tests have several in each direction.
        rows, cols = (16, 32) if m <= 256 else (128, 128)
        kernel[grid](*arguments, **constants, ROWS=rows, COLS=cols, STEP=min(cols, _STEP))
        return
    shared_bytes = _shared_bytes(named["u"].device.index)
    found, tuned, fastest = _choices(kernel, constants["DEPTH"], itemsize, shared_bytes)
    key = (named["M_BUCKET"], constants["INVERSE"], constants["PRECISION"])
    config = found[0] if torch.are_deterministic_algorithms_enabled() else fastest.get(key)
    if config is None:
        tuned[grid](*arguments, **constants)
        fastest[key] = tuned.best_config
    else:
        kernel[grid(config.kwargs)](*arguments, **constants, **config.all_kwargs())


@cache
def _shared_bytes(device: int) -> int:
    """Shared memory that one block may have."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


@cache
def _choices(kernel: Any, depth: int, itemsize: int, shared_bytes: int) -> tuple[list[Any], Any, dict[Any, Any]]:
    """The configurations; the kernel that times them once for sizes like these; the fastest by what it is timed for.

    The last spares the host the autotuner's work in every launch.
    """
    found = configurations(depth, itemsize, shared_bytes, accumulates=kernel is gradient_kernel)
    return found, triton.autotune(configs=found, key=["M_BUCKET", "INVERSE", "PRECISION"])(kernel), {}
