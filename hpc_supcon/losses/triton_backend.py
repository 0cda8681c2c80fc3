"""The Triton backend (loss.backend=triton): prepares the operands, chooses sizes and launches the kernels.

Imported only when it is used. Results do not depend on the order of execution: there are no atomics, and the partial
results of column splits are added in a fixed order. Needs compute capability 8.0 or later; with TRITON_INTERPRET=1 it
runs on the CPU. The equations are in autograd.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from .autograd import RowSums
from .gathered import GatheredRows
from .precision import float32_products
from .triton_kernels import INTERPRETED, LOG2_E, gradient_kernel, operand_kernel, pair_gradient_kernel, sums_kernel
from .triton_sizes import column_span, launch_kernel, operand_chunk, operand_depth, strip_rows


@dataclass(frozen=True)
class _Operands:
    """Rows and columns of the kernels, sorted by class.

    own_u [n, DEPTH], u [m, DEPTH]: rows of length sqrt(1 / (tau ln 2)), zero beyond D. bounds [3, n] int32: see
    sums_kernel. order [m]: the gathered rows that the columns are; None where that is their own order.
    """

    own_u: Tensor
    u: Tensor
    bounds: Tensor
    order: Tensor | None


class TritonBackend:
    """The TiledBackend of Triton kernels: products in `precision` "bf16", "tf32" or "fp32", sums in fp32."""

    def __init__(self, precision: str) -> None:
        self._precision = precision
        self._itemsize = 2 if precision == "bf16" else 4
        # The interpreter's tl.dot would multiply the bit patterns of bf16; products of bf16 are exact in fp32.
        self._dtype = torch.bfloat16 if precision == "bf16" and not INTERPRETED else torch.float32

    def row_sums(self, gathered: GatheredRows, temperature: float | None) -> RowSums:
        operands = self._operands(gathered)
        n, m = len(operands.own_u), len(operands.u)
        span = column_span(n, m, operands.u.device)
        out = torch.empty(max(1, triton.cdiv(m, span)), 5, n, dtype=torch.float32, device=operands.u.device)
        if n:
            arguments = (operands.own_u, operands.u, operands.bounds, out)
            self._launch(sums_kernel, arguments, span, temperature)
        sim_pos, exp_pos, exp_neg, inv_pos, sim_inv_pos = out[0] if len(out) == 1 else out.sum(0)
        if temperature is None:
            return RowSums(sim_pos, exp_pos, exp_neg, None, None)
        return RowSums(sim_pos, exp_pos, exp_neg, inv_pos, sim_inv_pos)

    def row_gradients(self, gathered: GatheredRows, weights_M4: Tensor, temperature: float | None) -> Tensor:
        operands = self._operands(gathered)
        if operands.order is not None:
            weights_M4 = weights_M4.index_select(0, operands.order)
        weights = weights_M4.float().T.contiguous()
        depth, d = operands.u.shape[1], gathered.u.shape[1]
        in_one_product = operand_chunk(depth, self._itemsize) == depth
        compute = self._row_gradients if in_one_product else self._row_gradients_by_strips
        grad_ND = compute(operands, weights, temperature)
        return grad_ND if depth == d else grad_ND[:, :d].contiguous()

    def _row_gradients(self, operands: _Operands, weights: Tensor, temperature: float | None) -> Tensor:
        (n, depth), m = operands.own_u.shape, len(operands.u)
        span = column_span(n, m, operands.u.device, output_bytes=4 * n * depth)
        out = torch.empty(max(1, triton.cdiv(m, span)), n, depth, dtype=torch.float32, device=operands.u.device)
        if n:
            arguments = (operands.own_u, operands.u, operands.bounds, weights, out)
            self._launch(gradient_kernel, arguments, span, temperature)
        return out[0] if len(out) == 1 else out.sum(0)

    def _row_gradients_by_strips(self, operands: _Operands, weights: Tensor, temperature: float | None) -> Tensor:
        """The same for embeddings whose gradient does not fit in the registers of one program.

        The kernel writes a strip of rows of G + G.T, which is multiplied by u: every similarity is computed once,
        where a kernel for each part of the feature dimensions would compute it anew.
        """
        (n, depth), m = operands.own_u.shape, len(operands.u)
        grad_ND = torch.empty(n, depth, dtype=torch.float32, device=operands.u.device)
        rows = strip_rows(m, self._itemsize)
        # Rows of the strip are aligned, which wide loads and stores need.
        strip = torch.empty(min(rows, n), triton.cdiv(m, 16) * 16, dtype=self._dtype, device=operands.u.device)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            own_u, bounds = operands.own_u[part], operands.bounds[:, part].contiguous()
            span = column_span(len(own_u), m, operands.u.device, output_bytes=0)
            arguments = (own_u, operands.u, bounds, weights, strip)
            self._launch(pair_gradient_kernel, arguments, span, temperature, strip.shape[1])
            self._multiply(strip[: len(own_u), :m], operands.u, grad_ND[part])
        return grad_ND.mul_(math.sqrt(1 / LOG2_E))

    def _multiply(self, strip: Tensor, u: Tensor, out: Tensor) -> None:
        if self._dtype == torch.bfloat16:
            torch.mm(strip, u, out_dtype=torch.float32, out=out)
            return
        with float32_products(self._precision if u.is_cuda else None):
            torch.mm(strip, u, out=out)

    def _operands(self, gathered: GatheredRows) -> _Operands:
        own, class_ids = gathered.own, gathered.class_ids
        own_at = torch.arange(own.start, own.stop, device=class_ids.device)
        operands = _Operands(gathered.u, gathered.u, class_ids, None)
        if len(gathered.blocks) > 1:  # each block is sorted by itself
            class_ids, order = class_ids.sort(stable=True)
            places = torch.arange(len(order), device=order.device)
            own_at = torch.empty_like(order).index_copy_(0, order, places)[own]
            operands = replace(operands, order=order)
        u = self._operand(gathered.u, operands.order)
        own_u = u[own] if operands.order is None else self._operand(gathered.u[own], None)
        own_ids = gathered.class_ids[own]
        bounds = [torch.searchsorted(class_ids, own_ids, right=right) for right in (False, True)]
        return replace(operands, own_u=own_u, u=u, bounds=torch.stack([*bounds, own_at]).int())

    def _operand(self, u: Tensor, order: Tensor | None) -> Tensor:
        """u[order] * sqrt(1 / ln 2) in the dtype of the products, [rows, DEPTH]."""
        rows, d = u.shape
        depth = operand_depth(d)
        out = torch.empty(rows, depth, dtype=self._dtype, device=u.device)
        if rows:
            width, block = min(depth, 128), 256 if INTERPRETED else 32
            options = {
                "ORDERED": order is not None,
                "TF32": self._precision == "tf32",
                "DEPTH": depth,
                "ROWS": block,
                "WIDTH": width,
            }
            grid = (triton.cdiv(rows, block), depth // width)
            operand_kernel[grid](u.contiguous(), order, out, rows, d, math.sqrt(LOG2_E), **options)
        return out.bfloat16().float() if INTERPRETED and self._precision == "bf16" else out

    def _launch(
        self, kernel: Any, tensors: tuple[Tensor, ...], span: int, temperature: float | None, *rest: int
    ) -> None:
        n, (m, depth) = len(tensors[0]), tensors[1].shape
        sizes = (n, m, temperature or 0.0, span, triton.next_power_of_2(m), *rest)
        constants = {
            "CHUNK": operand_chunk(depth, self._itemsize),
            "DEPTH": depth,
            "INVERSE": temperature is not None,
            # tl.dot ignores the precision for bf16 operands, but requires a valid name.
            "PRECISION": "ieee" if INTERPRETED or self._precision == "fp32" else "tf32",
            "enable_fp_fusion": True,
        }
        if "BF16" in kernel.arg_names:
            constants["BF16"] = self._precision == "bf16"
        launch_kernel(kernel, (*tensors, *sizes), constants, self._itemsize)
