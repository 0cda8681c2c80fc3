"""The Triton kernels: their results in the interpreter on the CPU, and that they compile for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]

# Triton reads TRITON_INTERPRET when it is imported, so the checks run in a process of their own.
RESULTS = """
import torch
from hpc_supcon import losses
from hpc_supcon.losses.gathered import GatheredRows, count_pairs
from hpc_supcon.losses.torch_tiled import TorchTiledBackend
from hpc_supcon.losses.triton_kernels import TritonBackend

torch.manual_seed(0)
torch.set_num_threads(1)


def gradient(make, x, labels, queue):
    x = x.clone().requires_grad_()
    loss = make(x, labels, queue=queue)
    loss.backward()
    return loss.detach().double(), x.grad.double()


MODULES = {
    "out": lambda **options: losses.SupConLoss(0.1, **options),
    "in": lambda **options: losses.SupConLoss(0.05, form="in", **options),
    "tcl": lambda **options: losses.TCLLoss(0.1, k1=50.0, k2=1.5, learnable_temperature=True, **options),
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
            for precision, tolerance in (("ieee", 1e-5), ("bf16", 1e-2)):
                kernel = make(backend="triton", precision=precision)
                got, got_grad = gradient(kernel, x, labels, queue)
                assert abs(got - value) <= tolerance * max(1, abs(value)), (n, d, name, precision, got, value)
                size = max(float(grad.norm()), 1e-2)
                error = float((got_grad - grad).norm()) / size
                assert error <= tolerance, (n, d, name, precision, error)
                for a, b in zip(kernel.parameters(), oracle.parameters()):
                    assert abs(a.grad - b.grad) <= tolerance * max(1, abs(b.grad)), (name, precision)
# A rank in the middle: its rows begin at 37, each rank's rows are sorted by themselves, and there is a queue of 8.
u = torch.nn.functional.normalize(torch.randn(98, 20), dim=1) * 3
blocks = [(0, 37), (37, 71), (71, 90), (90, 98)]
class_ids = torch.cat([torch.randint(0, 5, (b - a,)).sort().values for a, b in blocks])
own = slice(37, 71)
gathered = GatheredRows(u, class_ids, blocks, own, *count_pairs(class_ids, own), [37, 34, 19])
row_weights = torch.rand(98, 4)
row_weights[90:] = 0
tiled, triton = TorchTiledBackend(8), TritonBackend("ieee")
expected, got = tiled.row_sums(gathered, 0.1), triton.row_sums(gathered, 0.1)
for name in ("sim_pos", "exp_pos", "exp_neg", "inv_pos", "sim_inv_pos"):
    torch.testing.assert_close(getattr(got, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-4)
expected = tiled.row_gradients(gathered, row_weights, 0.1)
torch.testing.assert_close(triton.row_gradients(gathered, row_weights, 0.1), expected, rtol=1e-4, atol=0.1)
print("results agree")
"""


def test_kernels_in_the_interpreter_agree_with_the_dense_backend():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", RESULTS], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "results agree" in done.stdout


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from hpc_supcon.losses import triton_kernels as kernels

POINTERS = {"class_ids": "*i32", "out": "*fp32", "row_weights": "*fp32"}
for tuned in (kernels._sums_kernel, kernels._gradient_kernel):
    names = tuned.fn.arg_names
    for capability, dtype, depth, chunk in ((80, "bf16", 128, 128), (90, "bf16", 2048, 64), (90, "fp32", 128, 128)):
        fixed = dict(CHUNK=chunk, DEPTH=depth, INVERSE=True, PRECISION="tf32", UPCAST=False, ROWS=64, COLS=32)
        if "WIDTH" in names:
            fixed["WIDTH"] = min(depth, 256)
        types = {**POINTERS, "u": "*" + dtype, "temperature": "fp32", **dict.fromkeys(fixed, "constexpr")}
        source = ASTSource(
            fn=tuned.fn,
            signature={name: types.get(name, "i32") for name in names},
            constexprs={(names.index(name),): value for name, value in fixed.items()},
        )
        options = dict(num_warps=4, num_stages=2, enable_fp_fusion=True)
        ptx = compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
        assert ("wgmma" if capability == 90 else "mma.sync") in ptx
print("compiled")
"""


def test_kernels_compile_to_tensor_core_code_without_a_gpu(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compiled" in done.stdout
