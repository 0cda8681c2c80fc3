"""The Triton kernels: their results in the interpreter on the CPU, and what they cost when compiled for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.scripts import run_script

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]

# Triton reads TRITON_INTERPRET when it is imported, so the checks run in a process of their own. In bf16 an embedding
# is rounded by up to 1 / 256, which is most of the error of a gradient and depends on the draw: 0.7 to 1.2 % at 0.05
# and five dimensions. The other checks compare with what is computed from rounded embeddings.
RESULTS = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from hpc_supcon import losses

torch.manual_seed(5)
torch.set_num_threads(1)


def gradient(make, x, labels, queue):
    x = x.clone().requires_grad_()
    loss = make(x, labels, queue=queue)
    loss.backward()
    return loss.detach().double(), x.grad.double()


class Other(torch.nn.Module):
    # A formula that the kernels do not have, of all the statistics: uniformity too, where the anchors without
    # positives count. It has a gradient by a temperature that is a tensor.
    def __init__(self, **options):
        super().__init__()
        self.options, self.tau = options, torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, x, labels, queue):
        stats = losses.pairwise_stats(x, labels, self.tau, inverse=True, queue=queue, **self.options)
        valid = stats.log_neg.exp().log1p() - stats.mean_pos + 0.3 * stats.log_pos - 0.7 * stats.log_inv
        uniformity = torch.logaddexp(stats.log_neg, torch.zeros_like(stats.log_neg))
        return losses.global_mean(valid, stats.valid) + losses.global_mean(uniformity, stats.n_pos >= 0)


MODULES = {
    "out": lambda **options: losses.SupConLoss(0.1, **options),
    "in": lambda **options: losses.SupConLoss(0.05, form="in", **options),
    "tcl": lambda **options: losses.TCLLoss(0.1, k1=50.0, k2=1.5, learnable_temperature=True, **options),
    "other": Other,
}
# (rows, dimensions, classes): several tiles of 16 x 32 and a rest, several chunks of 64 features and a rest.
for n, d, classes in ((1, 3, 1), (70, 5, 4), (45, 16, 1), (45, 40, 45), (83, 150, 7)):
    x, labels = torch.randn(n, d), torch.randint(0, classes, (n,))
    past = torch.randn(21, d)
    for queue in (None, (past, torch.randint(0, classes, (21,)))):
        wide = None if queue is None else (past.double(), queue[1])
        for name, make in MODULES.items():
            oracle = make(backend="reference").double()
            value, grad = gradient(oracle, x.double(), labels, wide)
            for precision, tolerance in (("fp32", 1e-5), ("bf16", 1e-2)):
                if name == "other" and precision == "bf16":
                    continue
                kernel = make(backend="triton", precision=precision)
                got, got_grad = gradient(kernel, x, labels, queue)
                assert abs(got - value) <= tolerance * max(1, abs(value)), (n, d, name, precision, got, value)
                size = max(float(grad.norm()), 1e-2)
                error = float((got_grad - grad).norm()) / size
                assert error <= tolerance, (n, d, name, precision, error)
                for a, b in zip(kernel.parameters(), oracle.parameters()):
                    assert abs(a.grad - b.grad) <= tolerance * max(1, abs(b.grad)), (name, precision)
                if name != "other":
                    assert kernel.stats == oracle.stats, (kernel.stats, oracle.stats)

# Odd calls: no rows, views, SimCLR, rows that are not contiguous, half precision, a factor before backward.
x = torch.randn(11, 3, 14)[:, :, ::2]
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for make in (losses.SimCLRLoss, lambda **options: losses.TCLLoss(0.1, k2=0.0, **options)):
        found = []
        for backend in ("reference", "triton"):
            part = x.to(dtype).clone().requires_grad_()
            loss = make(backend=backend, precision="fp32")(part, torch.arange(11) % 3)
            (3 * loss).backward()
            found.append((loss.detach(), part.grad))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
        assert found[1][1].dtype == dtype
        assert (found[1][1] - found[0][1]).norm() <= tolerance * found[0][1].norm()
none = torch.empty(0, 4, requires_grad=True)
loss = losses.SupConLoss(backend="triton", precision="fp32")(none, torch.empty(0, dtype=torch.int64))
loss.backward()
assert (float(loss.detach()), none.grad.shape) == (0.0, (0, 4))


class NoNumberIsRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket is not torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


with NoNumberIsRead():  # of a learned temperature, for which the host would wait
    loss = losses.TCLLoss(0.1, learnable_temperature=True, backend="triton", precision="bf16", validate=False)
    loss(torch.randn(6, 3, requires_grad=True), torch.tensor([0, 1, 0, 1, 1, 2])).backward()
assert loss.log_temperature.grad.abs() > 0
print("results agree")
"""

# The sums and gradients of a rank's rows against the definition in float64, on the rows as the format rounds them.
SIZES = """
import math

import torch
from hpc_supcon.losses import triton_sizes
from hpc_supcon.losses.gathered import ZERO_ROW
from hpc_supcon.losses.triton_backend import FACTOR, TritonBackend

torch.manual_seed(0)
torch.set_num_threads(1)
triton_sizes._SCRATCH_BYTES = 100 << 10  # few splits, and several strips of G
TAU = torch.tensor(0.1, dtype=torch.float64)
BITS = {"fp32": 22, "tf32": 10, "bf16": 7}
ROUND = {
    "fp32": lambda x: x,
    "bf16": lambda x: x.bfloat16(),
    "tf32": lambda x: ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32),
}


def definition(u, ids, own, weights, tau):
    s = u @ u.T
    other = ~torch.eye(len(u), dtype=torch.bool)
    positive, negative = (ids[:, None] == ids) & other, ids[:, None] != ids
    inverse = torch.exp(-TAU * s) * positive * (tau is not None)
    sums = [(s * positive), s.exp() * positive, s.exp() * negative, inverse, inverse * s]
    of_sim, of_pos, of_neg, of_inv = weights.T[:, :, None]
    g = positive * (of_sim + of_pos * s.exp()) - TAU * of_inv * inverse + negative * of_neg * s.exp()
    return [each.sum(1)[own] for each in sums], ((g + g.T) @ u)[own]


def check(n, d, classes, before=0, after=0, queue=0, tau=TAU, formats=("fp32", "bf16")):
    lengths = [length for length in (before, n, after, queue) if length]
    m, own = sum(lengths), slice(before, before + n)
    ids = torch.cat([torch.randint(0, classes, (length,)).sort().values for length in lengths])
    if classes > 1000:
        ids = torch.arange(m)
    z = torch.nn.functional.normalize(torch.randn(m, d), dim=1)
    weights = torch.rand(m, 4)
    for precision in formats:
        backend = TritonBackend(precision)
        rows, _ = backend.operand(z, None, TAU.rsqrt(), ZERO_ROW, padded=False)
        exact = z.double() * math.sqrt(math.log2(math.e) / TAU)
        assert torch.equal(ROUND[precision](rows), rows)
        assert ((rows - exact).abs() <= exact.abs() * 2.0 ** -BITS[precision] / 2 + 1e-6).all(), precision
        own_u, _ = backend.operand(z[own], None, TAU.rsqrt(), ZERO_ROW)
        operands = backend.operands(own_u, None if len(lengths) == 1 else rows.to(backend.row_dtype), ids, before)
        order = slice(None) if operands.order is None else operands.order
        expected, gradient = definition(rows.double() / FACTOR, ids, own, weights.double(), tau)
        sums = backend.sums(operands, tau)
        for got, want in zip(sums.sum(0)[: 3 if tau is None else 5], expected):
            error = float(((got - want).abs() / want.abs().clamp(min=1)).max())
            assert error <= 1e-5, (n, d, classes, precision, error)
        of_columns = weights[order].T.contiguous()
        found = backend.gradients(operands, of_columns, tau)
        assert not found[:, :, d:].any()
        error = float((found.sum(0)[:, :d] - gradient).norm() / gradient.norm().clamp(min=1e-2))
        assert error <= (1 / 256 if precision == "bf16" else 1e-5), (n, d, classes, precision, error)
        if n == 130:
            assert torch.equal(found, backend.gradients(operands, of_columns, tau))
            assert torch.equal(sums, backend.sums(operands, tau))


check(1, 3, 1)
check(1, 512, 3, queue=5)
check(17, 200, 3, before=30, after=9, queue=21, formats=("fp32", "bf16", "tf32"))
check(127, 128, 9, queue=150, tau=None)
check(128, 256, 1)  # all rows in one class
check(128, 3, 1001)  # classes of one row: no positives at all
check(129, 512, 4, after=3, formats=("bf16",))
check(130, 40, 6, before=300, after=37, queue=200)  # tiles of 128 x 128, with the row itself in another tile
check(1025, 3, 60, formats=("fp32",))
check(1025, 100, 60, formats=("bf16",))
print("results agree")
"""


@pytest.mark.parametrize("checks", [RESULTS, SIZES], ids=["losses", "sizes"])
def test_kernels_in_the_interpreter_agree_with_the_dense_backend(checks):
    assert "results agree" in run_script(checks, TRITON_INTERPRET="1")


COMPILE = """
import sys
sys.path.insert(0, "benchmarks")
import kernel_cost
from hpc_supcon.losses import triton_kernels as kernels

for capability, dtype, dim in ((80, "bf16", 128), (90, "bf16", 2048), (90, "tf32", 128)):
    for kernel in (kernels.sums_kernel, kernel_cost.backward_kernel(dtype, dim)):
        smallest = kernel_cost.configurations(kernel, dtype, dim, capability)[-2]
        ptx = kernel_cost.compile_kernel(kernel, "tcl", dtype, dim, smallest, capability).asm["ptx"]
        assert ("wgmma" if capability == 90 else "mma.sync") in ptx, (capability, dtype, dim)
for kernel, most in ((kernels.sums_kernel, 5), (kernels.gradient_kernel, 9)):
    config = kernel_cost.configurations(kernel, "bf16", 128)[0]
    loop, pairs = kernel_cost.cost(kernel, "tcl", "bf16", 128, config)
    assert loop.instructions.total() / pairs <= most, loop
    assert loop.stack_bytes == 0, loop
print("compiled")
"""


def test_kernels_compile_for_the_tensor_cores_and_spend_few_instructions_on_a_pair(tmp_path):
    assert "compiled" in run_script(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_every_launch_of_a_call_is_prepared_as_for_a_gpu(tmp_path):
    """Triton's own way to a launch, up to the call of the CUDA driver: no test without a GPU goes that way else."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/loss_host.py", "--loss", "tcl", "--runs", "2", "--details"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, counts, _, kernels = done.stdout.splitlines()
    assert counts.split("|")[4].strip() == "7", counts
    for name in ("_forward", "_bounds", "sums", "_formula", "_mean", "gradient", "_backward"):
        assert f"'{name}_kernel': 1" in kernels, kernels


def test_column_splits_keep_a_gpu_busy_where_blocks_of_rows_leave_a_wave_half_empty():
    from hpc_supcon.losses.triton_sizes import column_splits

    processors, tile = 132, 128
    for n in range(16384, 25601, 128):  # with one split, 50 % of the processors work at 17,000 rows
        span = -(-n // column_splits(n // tile, n, processors) // 256) * 256
        waves = -(-(n // tile) * -(-n // span) // processors)
        assert n // tile * n >= 0.8 * processors * waves * span


def test_every_gpu_and_size_has_a_configuration_that_fits():
    from hpc_supcon.losses import triton_sizes

    devices, dims = (99, 163, 227), (16, 128, 256, 512, 2048)
    for kilobytes, dim, itemsize, accumulates in product(devices, dims, (2, 4), (True, False)):
        if dim * itemsize <= 512 or not accumulates:  # wider gradients are multiplied strip by strip
            assert triton_sizes.configurations(dim, itemsize, kilobytes << 10, accumulates=accumulates)
