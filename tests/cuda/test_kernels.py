"""The Triton kernels of the loss on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from hpc_supcon.losses import SupConLoss, TCLLoss
from tests import brute_force
from tests.chunked import value_and_gradient
from tests.devices import needs_cuda

TAU, K1 = 0.1, 50.0
SIZES = (1, 17, 1025, 4097, 16384)
GRADIENT = {"bf16": 1e-2, "tf32": 4e-3}
"""Largest relative error of the gradient. Where features are rounded to bf16, or cut to TF32, and all else is exact,
it is 3.3e-3 and 1.4e-3 for 128 dimensions and more; 1.8e-2 and 2.6e-3 for 3."""
FEW_DIMENSIONS = 5.0
"""Times as much for 3 dimensions, where similarities are large."""


@pytest.mark.parametrize("block", [3, 1024])
@pytest.mark.parametrize("k1", [0.0, K1])
@pytest.mark.parametrize("with_queue", [False, True])
def test_the_oracle_is_the_formula_pair_by_pair(block, k1, with_queue):
    x, labels = torch.randn(8, 5), torch.tensor([0, 1, 0, 2, 1, 0, 3, 4])
    queue = (torch.randn(4, 5), torch.tensor([3, 1, 9, 9])) if with_queue else None
    want, gradient = brute_force.value_and_gradient(x, labels, TAU, "tcl", k1=k1, queue=queue)
    found, own = value_and_gradient(x, labels, TAU, k1=k1, queue=queue, block=block)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(own, gradient)


def test_the_oracle_of_a_batch_without_a_pair_is_zero():
    value, gradient = value_and_gradient(torch.randn(2, 3), torch.tensor([0, 1]), TAU)
    assert value == 0
    assert not gradient.any()


# Deterministic kernels take one fixed configuration, and time none. Sizes share compiled kernels: they are one test.
@needs_cuda
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("dimensions", [3, 128, 200, 256, 512, 2048])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("what", ["queue", "inverse"])
def test_on_cuda_value_and_gradient_are_those_of_float64_and_repeat_to_the_bit(dimensions, precision, what):
    check_kernels(SIZES, dimensions, precision, what, "cuda", "triton")


@pytest.mark.parametrize("what", ["queue", "inverse"])
def test_the_check_of_the_kernels_itself_on_the_tiled_backend(what):
    check_kernels((1, 17, 150), 3, "tf32", what, "cpu", "tiled")


def check_kernels(sizes, dimensions, precision, what, device, backend):
    for n in sizes:
        x = torch.randn(n, dimensions, device=device)
        labels = torch.randint(0, max(2, n // 100), (n,), device=device)
        queue, k1 = None, 0.0
        if what == "queue":
            queue = (torch.randn(300, dimensions, device=device), torch.randint(0, 4, (300,), device=device))
            loss = SupConLoss(TAU, backend=backend, precision=precision)
        else:
            k1, loss = K1, TCLLoss(TAU, k1=K1, backend=backend, precision=precision)

        def call(x=x, labels=labels, queue=queue, loss=loss):
            own = x.clone().requires_grad_()
            value = loss(own, labels, queue)
            value.backward()
            return value.detach(), own.grad

        (value, gradient), again = call(), call()
        assert torch.equal(value, again[0]), n
        assert torch.equal(gradient, again[1]), n
        want, exact = value_and_gradient(x, labels, TAU, k1=k1, queue=queue)
        allowed = GRADIENT[precision] * (FEW_DIMENSIONS if dimensions < 16 else 1)
        assert abs(value - want) <= allowed * max(1.0, abs(want)), (n, float(value), float(want))
        error = float((gradient.double() - exact).norm())
        assert error <= allowed * max(float(exact.norm()), 1e-6), (n, error, float(exact.norm()))
