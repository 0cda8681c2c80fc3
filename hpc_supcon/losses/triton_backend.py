"""The Triton backend (loss.backend=triton): prepares the operands, chooses sizes and launches the kernels.

Imported only when it is used. Results do not depend on the order of execution: there are no atomics, and the partial
results of column splits are added in a fixed order. Needs compute capability 8.0 or later; with TRITON_INTERPRET=1 it
runs on the CPU. The equations are in autograd.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .precision import float32_products
from .triton_kernels import INTERPRETED, LOG2_E, arrange_kernel, gradient_kernel, pair_gradient_kernel, sums_kernel
from .triton_rows import class_bounds, normalize
from .triton_sizes import ceil_div, column_span, launch_kernel, operand_chunk, operand_depth, power_of_2, strip_rows

FACTOR = math.sqrt(LOG2_E)
"""Operands are u times this: their products are s / ln 2."""


class Operands(NamedTuple):
    """Rows and columns of the kernels, sorted by class.

    own_u [n, DEPTH], u [m, DEPTH]: rows of length sqrt(1 / (tau ln 2)), zero beyond D. bounds [3, n] int32: see
    sums_kernel. order [m]: the gathered rows that the columns are; None where that is their own order.
    """

    own_u: Tensor
    u: Tensor
    bounds: Tensor
    order: Tensor | None


class TritonBackend:
    """Sums and gradients by Triton kernels: products in `precision` "bf16", "tf32" or "fp32", sums in fp32."""

    def __init__(self, precision: str) -> None:
        self._precision = precision
        self._itemsize = 2 if precision == "bf16" else 4
        self.row_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        """In which the operands of other ranks arrive: rounding them again changes nothing."""
        # The interpreter's tl.dot would multiply the bit patterns of bf16; products of bf16 are exact in fp32.
        self._dtype = torch.float32 if INTERPRETED else self.row_dtype

    def operand(
        self, x_ND: Tensor, order_N: Tensor | None, scale: Tensor, zero_row: float, *, padded: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(rows x[order] of length `scale` FACTOR, rounded as the products need them, [N, DEPTH], or [N, D] unless
        padded; 1 / |x| [N, 1]). `scale`: 0-dim, on the device of x."""
        d = x_ND.shape[1]
        width, tf32 = operand_depth(d) if padded else d, self._precision == "tf32"
        options: dict[str, Any] = {"factor": FACTOR, "dtype": self._dtype, "width": width, "tf32": tf32}
        u_ND, inverse_N1 = normalize(x_ND, order_N, scale, zero_row, **options)
        if INTERPRETED and self._precision == "bf16":
            u_ND = u_ND.bfloat16().float()
        return u_ND, inverse_N1

    def operands(self, own_u: Tensor, u_MD: Tensor | None, labels_M: Tensor, own_start: int) -> Operands:
        """`own_u`: from `operand`. u_MD: the operands [M, D] of all rows, in no order, of which own_u are those from
        `own_start` on; None: own_u are all rows, and labels_M are ascending."""
        n = len(own_u)
        if u_MD is None:
            return Operands(own_u, own_u, class_bounds(labels_M, None, 0, n), None)
        labels_M, order = labels_M.sort(stable=True)
        u = self._arranged(u_MD.to(self._dtype), order, own_u.shape[1])
        return Operands(own_u, u, class_bounds(labels_M, order, own_start, n), order)

    def _arranged(self, u_MD: Tensor, order: Tensor, depth: int) -> Tensor:
        """u[order], zero beyond D."""
        rows, d = u_MD.shape
        out = u_MD.new_empty(rows, depth)
        if rows:
            width, block = min(depth, 128), 256 if INTERPRETED else 32
            grid = (ceil_div(rows, block), depth // width)
            arrange_kernel[grid](u_MD.contiguous(), order, out, rows, d, DEPTH=depth, ROWS=block, WIDTH=width)
        return out

    def sums(self, operands: Operands, temperature: Tensor | None) -> Tensor:
        """[splits, 5, n] fp32, to be added over splits: the own rows' sim_pos, exp_pos, exp_neg, inv_pos and
        sim_inv_pos of RowSums. `temperature`: 0-dim, on the device; None where the last two are not needed."""
        n, m = len(operands.own_u), len(operands.u)
        span = column_span(n, m, operands.u.device)
        out = torch.empty(max(1, ceil_div(m, span)), 5, n, dtype=torch.float32, device=operands.u.device)
        if n:
            arguments = (operands.own_u, operands.u, operands.bounds, out)
            self._launch(sums_kernel, arguments, span, temperature)
        return out

    def gradients(self, operands: Operands, weights_4M: Tensor, temperature: Tensor | None) -> Tensor:
        """dL / du of the own rows, [splits, n, DEPTH] fp32, to be added over splits.

        `weights_4M`: sim_weight, pos_weight, neg_weight, inv_weight of the columns, contiguous fp32.
        `temperature`: 0-dim, on the device; None where every inv_weight is zero.
        """
        (n, depth), m = operands.own_u.shape, len(operands.u)
        if operand_chunk(depth, self._itemsize) != depth:
            return self._gradients_by_strips(operands, weights_4M, temperature)[None]
        span = column_span(n, m, operands.u.device, output_bytes=4 * n * depth)
        out = torch.empty(max(1, ceil_div(m, span)), n, depth, dtype=torch.float32, device=operands.u.device)
        if n:
            arguments = (operands.own_u, operands.u, operands.bounds, weights_4M, out)
            self._launch(gradient_kernel, arguments, span, temperature)
        return out

    def _gradients_by_strips(self, operands: Operands, weights: Tensor, temperature: Tensor | None) -> Tensor:
        """The same for embeddings whose gradient does not fit in the registers of one program, [n, DEPTH].

        The kernel writes a strip of rows of G + G.T, which is multiplied by u: every similarity is computed once,
        where a kernel for each part of the feature dimensions would compute it anew.
        """
        (n, depth), m = operands.own_u.shape, len(operands.u)
        grad_ND = torch.empty(n, depth, dtype=torch.float32, device=operands.u.device)
        rows = strip_rows(m, self._itemsize)
        # Rows of the strip are aligned, which wide loads and stores need.
        strip = torch.empty(min(rows, n), ceil_div(m, 16) * 16, dtype=self._dtype, device=operands.u.device)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            own_u, bounds = operands.own_u[part], operands.bounds[:, part].contiguous()
            span = column_span(len(own_u), m, operands.u.device, output_bytes=0)
            arguments = (own_u, operands.u, bounds, weights, strip)
            self._launch(pair_gradient_kernel, arguments, span, temperature, strip.shape[1])
            self._multiply(strip[: len(own_u), :m], operands.u, grad_ND[part])
        return grad_ND.mul_(1 / FACTOR)

    def _multiply(self, strip: Tensor, u: Tensor, out: Tensor) -> None:
        with torch.autocast(u.device.type, enabled=False):
            if self._dtype == torch.bfloat16:
                torch.mm(strip, u, out_dtype=torch.float32, out=out)
                return
            with float32_products(self._precision if u.is_cuda else None):
                torch.mm(strip, u, out=out)

    def _launch(
        self, kernel: Any, tensors: tuple[Tensor, ...], span: int, temperature: Tensor | None, *rest: int
    ) -> None:
        n, (m, depth) = len(tensors[0]), tensors[1].shape
        sizes = (n, m, temperature, span, power_of_2(max(m, 1)), *rest)
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
