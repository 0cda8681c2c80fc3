"""The kernels that normalize rows: in the interpreter they compute what the PyTorch operations do; they compile."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import run_script

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]

# Triton reads TRITON_INTERPRET when it is imported, so the checks run in a process of their own.
RESULTS = """
import torch
from hpc_supcon.losses import triton_rows
from hpc_supcon.losses.gathered import _NormalizeRows, normalize_rows

torch.manual_seed(0)
torch.set_num_threads(1)


def results(function, x, gradient):
    x, tau = x.clone().requires_grad_(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    u = function(x, tau.rsqrt())
    u.backward(gradient)
    return u.detach(), x.grad.float(), tau.grad


for n, d, dtype in ((1, 3, torch.float32), (70, 5, torch.float32), (9, 2048, torch.bfloat16), (0, 4, torch.float32)):
    for order in (None, torch.randperm(n)):
        x = torch.randn(n, 2 * d).to(dtype)[:, ::2] * torch.logspace(-20, 30, n)[:, None]
        x[2:3], x[3:4] = 0, 1e-35
        x, gradient = x.to(dtype), torch.randn(n, d)
        got = results(lambda x, scale: normalize_rows(x, scale, torch.float32, order), x, gradient)
        want = results(lambda x, scale: _NormalizeRows.apply(x, order, scale, torch.float32), x, gradient)
        torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
        size = want[1].abs().amax(1, keepdim=True).clamp(min=1e-37) if n else 1  # down to 1e-30
        close = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got[1] / size, want[1] / size, rtol=close, atol=close)
        torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-5)
assert "Fused" in str(normalize_rows(torch.ones(2, 2, requires_grad=True), torch.tensor(1.0).double(), torch.float32))

# The ranges of the classes, against two searches of PyTorch.
for m, classes in ((1, 1), (700, 9), (300, 300), (600, 1)):
    ids = torch.randint(0, classes, (m,)) * 2**40 - 2**61
    for n in (0, 1, m // 2, m):
        start = (m - n) // 2
        labels, order = ids.sort(stable=True)
        itself = torch.empty_like(order)
        itself[order] = torch.arange(m)
        wanted = [itself[start : start + n]]
        wanted[:0] = [torch.searchsorted(labels, labels[wanted[0]], right=right) for right in (False, True)]
        assert torch.equal(triton_rows.class_bounds(labels, order, start, n), torch.stack(wanted).int())
    itself = torch.arange(m)
    assert torch.equal(triton_rows.class_bounds(labels, None, 0, m)[2], itself.int())
print("results agree")
"""


def test_the_kernels_normalize_and_sort_rows_as_pytorchs_operations_do():
    assert "results agree" in run_script(RESULTS, TRITON_INTERPRET="1")


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from hpc_supcon.losses import triton_formula, triton_kernels, triton_rows

POINTERS = {
    "order": "*i64", "scale": "*fp64", "inverse_length": "*fp32", "grad_u": "*fp32", "grad_x": "*bf16",
    "radial_out": "*fp32", "x": "*bf16", "zero_row": "fp32", "factor": "fp32", "u": "*bf16", "out": "*bf16",
    "labels": "*i64", "bounds": "*i32", "sums": "*fp32", "weights": "*fp32", "partial": "*fp64",
    "inverse_terms": "*fp64", "k1": "fp32", "k2": "fp32", "mean": "*fp32", "share": "*fp32",
}
ROWS = {"HAS_ORDER": True, "ROWS": 32, "DEPTH": 128}
KERNELS = [
    (triton_rows._forward_kernel, {**ROWS, "TF32": False}, {}),
    (triton_rows._forward_kernel, {**ROWS, "TF32": True}, {"u": "*fp32"}),
    (triton_rows._backward_kernel, {**ROWS, "HAS_FACTOR": True, "HAS_RADIAL": True}, {"factor": "*fp32"}),
    (triton_rows._bounds_kernel, {"HAS_ORDER": True, "COLUMNS": 256}, {}),
    (triton_kernels.arrange_kernel, {"DEPTH": 128, "ROWS": 32, "WIDTH": 128}, {}),
    (triton_formula._formula_kernel, {"INSIDE": False, "INVERSE": True, "ANCHORS": 256}, {}),
    (triton_formula._formula_kernel, {"INSIDE": True, "INVERSE": False, "ANCHORS": 256}, {}),
    (triton_formula._mean_kernel, {"PROGRAMS": 256}, {"sums": "*fp64"}),
]
for kernel, fixed, others in KERNELS:
    types = {**POINTERS, **others, **dict.fromkeys(fixed, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in fixed.items()},
    )
    assert ".target sm_90" in compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
print("compiled")
"""


def test_the_kernels_compile_without_a_gpu(tmp_path):
    assert "compiled" in run_script(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
